"""What is proven of models in their hub's layout, and that it leaves their logits as they were."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from stages.calibrate.forward.rehearsal import Rehearsal
from stages.calibrate.run import calibrate
from stages.calibrate.schedule.copied_layer import Chosen, in_float32
from stages.calibrate.schedule.proving import kind_of, told
from stages.fold.candidates import LayerParts
from stages.fold.folds import FoldMap, fold_norm
from stages.fold.proof import LayerProof
from stages.fold.sites import fold_map
from stages.model.skeleton import load_config
from stages.model.text_model import TextModel
from stages.progress import Silent
from stages.settings import CalibrateSettings
from state.objects import solutions
from state.reader import Calibration, open_run
from tests.families.catalogue import FAMILIES
from tests.families.logits import distance, logits, write_plain
from tests.families.tokenizer import write_text
from tests.families.write import write_family

NORM_PAIR = {"input_layernorm", "post_attention_layernorm"}
DENSE = NORM_PAIR | {"self_attn.v_proj", "mlp.up_proj"}
EXPERTS = NORM_PAIR | {"self_attn.v_proj", "mlp.experts.E.up_proj"}
MLA = {"input_layernorm", "post_attention_layernorm", "self_attn.kv_a_layernorm", "self_attn.kv_b_proj"}

FOLDED: dict[str, tuple[set[str], set[str]]] = {
    "phi-3": (NORM_PAIR | {"self_attn.qkv_proj", "mlp.gate_up_proj"}, set()),
    "glm-4": (NORM_PAIR | {"self_attn.v_proj", "mlp.gate_up_proj"}, set()),
    "granite": (DENSE, set()),
    "ministral-3": (DENSE, set()),
    "cohere-2": ({"input_layernorm", "self_attn.v_proj", "mlp.up_proj"}, set()),
    "olmo-3": (
        {"self_attn.v_proj", "mlp.up_proj"},
        {"self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.gate_proj", "mlp.up_proj"},
    ),
    "minimax-m2": (
        NORM_PAIR | {"self_attn.v_proj", "block_sparse_moe.experts.E.w3"},
        set(),
    ),
    "hunyuan-moe": (EXPERTS | {"mlp.shared_mlp.up_proj"}, set()),
    "deepseek-v2-lite": (MLA | {"mlp.up_proj", "mlp.experts.E.up_proj", "mlp.shared_experts.up_proj"}, set()),
    "qwen3.5-moe": (
        EXPERTS | {"mlp.shared_expert.up_proj"},
        {"linear_attn.out_proj"},
    ),
    "gemma-4-26b-a4b": (
        {
            "input_layernorm",
            "pre_feedforward_layernorm",
            "pre_feedforward_layernorm_2",
            "mlp.up_proj",
            "experts.E.up_proj",
        },
        {"self_attn.o_proj", "router.proj"},
    ),
}
"""Family -> what is divided, and what can't be scaled, within a layer."""


HOST = torch.device("cpu")


class Notes(Silent):
    """Keeps what people are told."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def note(self, text: str) -> None:
        self.lines.append(text)


def solved(family: str, folder: Path) -> tuple[Calibration, Notes]:
    """A run with solutions of AWQ lite."""
    write_family(FAMILIES[family](), folder / "model")
    write_text(folder / "text.jsonl")
    settings = CalibrateSettings(
        model=str(folder / "model"),
        data=str(folder / "text.jsonl"),
        run=folder / "run",
        recipe="nvfp4_awq_lite",
        samples=2,
        seq=32,
    )
    calibrate(settings, notes := Notes())
    return open_run(folder / "run"), notes


def proofs(run: Calibration) -> dict[int, LayerProof]:
    ((solver, layers),) = solutions(run.head.objects).items()
    every = {layer: run.solution(solver, layer).attributes["proof"] for layer in sorted(layers)}
    return {layer: LayerProof.decode(content) for layer, content in every.items()}


def proven(run: Calibration) -> FoldMap:
    return FoldMap(
        {site.name: site for layer, proof in proofs(run).items() for site in proof.sites_of(layer)}
    )


def within(names: set[str]) -> set[str]:
    return {name.partition("L.")[2] for name in names}


@pytest.mark.parametrize("family", FOLDED)
def test_what_folds_leaves_the_logits_as_they_were(family: str, tmp_path: Path) -> None:
    run, notes = solved(family, tmp_path)
    every = proofs(run).values()
    sources, kept = FOLDED[family]
    assert within({str(site["name"]) for proof in every for site in proof.sites}) == sources
    assert within({name for proof in every for name in proof.failed}) == kept
    assert bool(kept) == any("no input scale for" in line for line in notes.lines)

    written = FAMILIES[family]()
    tensors = {
        name: tensor.float() for name, tensor in load_file(tmp_path / "model" / "model.safetensors").items()
    }
    windows = torch.randint(3, 90, (2, 24), generator=torch.Generator().manual_seed(1))
    found = {}
    for name, held in (("plain", tensors), ("folded", folded(tensors, proven(run)))):
        write_plain(written, tmp_path / "model", held, tmp_path / name)
        found[name] = logits(written, tmp_path / name, windows)
    apart = distance(found["folded"], found["plain"])
    print(f"{family}: logits {apart:.1e} apart")
    assert apart < 1e-4


def folded(tensors: dict[str, torch.Tensor], folds: FoldMap) -> dict[str, torch.Tensor]:
    """Every site folded with scales between a quarter and four."""
    generator = torch.Generator().manual_seed(2)
    scales = {
        name: torch.exp2(4 * torch.rand(site.channels, generator=generator) - 2)
        for name, site in folds.sites.items()
    }
    changed = dict(tensors)
    for tensor, site in folds.norms.items():
        changed[tensor], scales[site.name] = fold_norm(tensors[tensor], scales[site.name], site.plus_one)
    for name, tensor in tensors.items():
        part = folds.tensor_fold(name, scales)
        if part is not None:
            changed[name] = part.apply(tensor)
    return changed


@pytest.mark.parametrize("family", ["qwen2-moe", "deepseek-v3", "gemma-2", "qwen3-next", "nemotron-3-nano"])
def test_families_of_the_table_fold_as_before(family: str, tmp_path: Path) -> None:
    run, _ = solved(family, tmp_path)
    shapes = {
        name: tuple(tensor.shape)
        for name, tensor in load_file(tmp_path / "model" / "model.safetensors").items()
    }
    config = load_config(tmp_path / "model")
    before = fold_map(shapes, TextModel.of(config), run.layout.relations)
    now = proven(run)
    assert now.sites.keys() == before.sites.keys()
    for name, site in now.sites.items():
        known = before.sites[name]
        assert {part.tensor for part in site.sources} == {part.tensor for part in known.sources}
        assert {part.module for part in site.consumers} == {part.module for part in known.consumers}
        assert (site.plus_one, site.block, site.repeat, site.degree) == (
            known.plus_one,
            known.block,
            known.repeat,
            known.degree,
        )


class Numbered(nn.Module):
    """A layer that knows its number and, unlike others, a window."""

    def __init__(self, number: int, window: int, width: int = 4) -> None:
        super().__init__()
        self.layer_idx, self.window = number, window
        self.linear = nn.Linear(width, width)


def test_layers_of_a_kind_differ_in_their_number_alone() -> None:
    def operand(layer: int) -> LayerParts:
        return LayerParts({}, {f"layers.{layer}.norm": [f"layers.{layer}.linear"]})

    kind = kind_of(3, Numbered(3, 128), operand(3))
    assert kind_of(5, Numbered(5, 128), operand(5)) == kind
    assert kind_of(5, Numbered(5, 256), operand(5)) != kind
    assert kind_of(5, Numbered(5, 128, 8), operand(5)) != kind
    assert kind_of(5, Numbered(5, 128), LayerParts({})) != kind


def test_a_copy_in_float32_shares_nothing_but_the_configuration() -> None:
    layer = Numbered(0, 8).to(torch.bfloat16)
    layer.config = config = object()
    layer.register_buffer("steps", torch.tensor([1]))
    copied = in_float32(layer, HOST)
    assert copied.linear.weight.dtype == torch.float32
    assert torch.equal(copied.linear.weight.bfloat16(), layer.linear.weight)
    assert copied.steps.dtype == torch.int64
    assert copied.config is config
    own = in_float32(copied, HOST)
    own.linear.weight.zero_()
    assert copied.linear.weight.any()


def test_a_layer_that_can_not_be_run_in_float32_is_not_folded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(_rehearsal: Rehearsal, _module: nn.Module) -> None:
        raise RuntimeError("float32 is not supported")

    monkeypatch.setattr(Rehearsal, "run", run)
    run_, notes = solved("llama-3", tmp_path)
    assert proven(run_).sites == {}
    why = "a copy of the layer in float32 can't be run (float32 is not supported)"
    assert any(line.endswith(why) for line in notes.lines)


def test_every_expert_is_chosen_in_turn() -> None:
    scores = torch.randn(4, 6)
    with Chosen({6}) as chosen:
        values, indices = torch.topk(scores, 3)
        other = scores[:, :5].topk(2)
    assert indices.tolist() == [[0, 1, 2], [3, 4, 5], [0, 1, 2], [3, 4, 5]]
    assert torch.equal(values, scores.gather(1, indices))
    assert torch.equal(other.indices, scores[:, :5].topk(2).indices)
    assert [tuple(seen.shape) for seen in chosen.scores] == [(4, 6), (4, 5)]


def test_reasons_are_told_together() -> None:
    proof = LayerProof.of("kind", [], {"layers.1.a.q": "why", "layers.1.b": "why", "layers.1.c": "other"})
    assert told(proof) == ["no input scale for a.q, b: why", "no input scale for c: other"]
