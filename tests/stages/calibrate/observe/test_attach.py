"""Observed values equal modelopt's max calibration, and observation changes nothing."""

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from stages.calibrate.observe.accumulate import Accumulators
from stages.calibrate.observe.arrays import plan_layout
from stages.calibrate.observe.attach import observed, record_weights
from stages.calibrate.observe.relations import probe
from stages.calibrate.schedule.whole import forward
from stages.model.skeleton import Skeleton, load_config
from state.names import Site
from state.source import Source
from tests.stages.calibrate import linear_moe
from tests.stages.export import support

TOKENS = torch.randint(0, 128, (6, 32), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module", params=["llama", "qwen3", "qwen3_moe", "linear_moe"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(request.param, tmp_path_factory.mktemp(request.param))


def make(family: str, folder: Path) -> Path:
    if family == "linear_moe":
        linear_moe.register()
        config = linear_moe.LinearMoeConfig(
            architectures=["LinearMoeForCausalLM"], **support.SIZES, **support.EXPERTS
        )
        return support.make_model(folder, config)
    return support.make_model(folder, support.config_of(family))


def load(folder: Path, experts: str = "grouped_mm") -> PreTrainedModel:
    with support.quiet():
        model = AutoModelForCausalLM.from_pretrained(folder).eval()
    if model._can_set_experts_implementation():
        model.set_experts_implementation(experts)
    return model


def observe(folder: Path, model: PreTrainedModel, tokens: torch.Tensor, batch: int) -> Accumulators:
    skeleton = Skeleton(load_config(folder), Source.open(folder).tensors)
    statistics = Accumulators(plan_layout(skeleton, probe(skeleton, model)), model.device)
    record_weights(skeleton, model, statistics)
    with observed(skeleton, model, statistics.layout, statistics):
        for windows in tokens.split(batch):
            forward(model, windows)
    return statistics


def test_logits_are_bit_equal_with_observers(folder: Path) -> None:
    model = load(folder)
    skeleton = Skeleton(load_config(folder), Source.open(folder).tensors)
    statistics = Accumulators(plan_layout(skeleton, probe(skeleton, model)), model.device)
    with torch.inference_mode():
        before = model(TOKENS, use_cache=False).logits
        with observed(skeleton, model, statistics.layout, statistics):
            during = model(TOKENS, use_cache=False).logits
        after = model(TOKENS, use_cache=False).logits
    assert torch.equal(before, during) and torch.equal(before, after)
    assert statistics.snapshot()["tokens/model.layers.L.self_attn.q_proj.input"].tolist() == [192, 192]


def test_every_site_sees_what_its_module_was_given(folder: Path) -> None:
    model = load(folder)
    seen: dict[str, torch.Tensor] = {}
    with torch.inference_mode():
        handles = [
            module.register_forward_pre_hook(
                lambda _m, args, name=name: seen.update(
                    {
                        name: torch.cat([seen[name], args[0].flatten(0, -2)])
                        if name in seen
                        else args[0].flatten(0, -2)
                    }
                )
            )
            for name, module in model.named_modules()
            if isinstance(module, torch.nn.Linear)
        ]
        model(TOKENS, use_cache=False)
    for handle in handles:
        handle.remove()
    statistics = observe(folder, model, TOKENS, batch=6)
    arrays = statistics.snapshot()
    assert len(seen) >= 9
    for name, rows in seen.items():
        array, place = statistics.layout.locate(Site(name, "input"))
        assert arrays[f"tokens/{array.key}"][place] == len(rows), name
        np.testing.assert_array_equal(arrays[f"amax/{array.key}"][place], rows.abs().amax(0).float().numpy())
        np.testing.assert_array_equal(
            arrays[f"abs_sum/{array.key}"][place].astype(np.float32),
            rows.double().abs().sum(0).float().numpy(),
        )


@pytest.mark.parametrize("batch", [1, 4])
def test_statistics_do_not_depend_on_the_batch_size(tmp_path: Path, batch: int) -> None:
    """Sums after rounding to float32: they are kept in float64 for this."""
    folder = make("qwen3_moe", tmp_path)
    model = load(folder)
    other, whole = (
        observe(folder, model, TOKENS, batch).snapshot(),
        observe(folder, model, TOKENS, 6).snapshot(),
    )
    for path, values in whole.items():
        np.testing.assert_array_equal(other[path].astype(np.float32), values.astype(np.float32), err_msg=path)


def test_eager_and_grouped_experts_agree(tmp_path: Path) -> None:
    folder = make("qwen3_moe", tmp_path)
    grouped = observe(folder, load(folder), TOKENS, 6).snapshot()
    eager = observe(folder, load(folder, "eager"), TOKENS, 6).snapshot()
    for path, values in grouped.items():
        np.testing.assert_array_equal(eager[path], values, err_msg=path)


def test_modelopt_finds_the_same_amax(folder: Path) -> None:
    compare_with_modelopt(folder, TOKENS, batch=6)


def test_modelopt_finds_the_same_amax_on_code_moe(shared: Path, tmp_path: Path) -> None:
    from stages.calibrate.forward.whole_model import load_tokenizer
    from stages.calibrate.text.tokens import token_matrix
    from stages.progress import Silent

    folder = shared / "models" / "code-moe"
    tokens = token_matrix(
        load_tokenizer(folder), str(shared / "data" / "code.jsonl"), samples=16, seq=256, progress=Silent()
    )
    compare_with_modelopt(folder, torch.from_numpy(tokens.astype(np.int64)), batch=8)


def compare_with_modelopt(folder: Path, tokens: torch.Tensor, batch: int) -> None:
    """Every input, K, V and weight amax of modelopt's own max calibration (eager experts), exactly."""
    import modelopt.torch.quantization as mtq
    from modelopt.recipe import load_recipe

    statistics = observe(folder, load(folder), tokens, batch)
    arrays, layout = statistics.snapshot(), statistics.layout
    model = load(folder, "eager")

    def loop(model: PreTrainedModel) -> None:
        for windows in tokens.split(batch):
            model(windows, use_cache=False)

    with support.quiet(), torch.no_grad():
        config = load_recipe("general/ptq/nvfp4_default-kv_fp8").quantize.model_dump(exclude_unset=True)
        mtq.quantize(model, config, loop)
    compared = 0
    for name, module in model.named_modules():
        if not name.endswith("_quantizer") or getattr(module, "_amax", None) is None:
            continue
        ours = ours_for(name, layout, arrays)
        assert ours == module._amax.item(), f"{name}: ours {ours}, modelopt {module._amax.item()}"
        compared += 1
    assert compared >= 20


def ours_for(name: str, layout: object, arrays: dict[str, np.ndarray]) -> float:
    """The largest value over all channels and experts of the sites behind a modelopt quantizer."""
    roles = {
        "k_bmm_quantizer": "k",
        "v_bmm_quantizer": "v",
        "weight_quantizer": "weight",
        "input_quantizer": "input",
    }
    module, _, quantizer = name.rpartition(".")
    for parameter, leaf in (("gate_up_proj", "gate_proj"), ("down_proj", "down_proj")):
        if quantizer == f"{parameter}_input_quantizer":
            array, place = layout.locate(Site(f"{module}.0.{leaf}", "input"))  # type: ignore[attr-defined]
            return float(np.nanmax(arrays[f"amax/{array.key}"][place[:-1]]))
    role = roles[quantizer]
    array, place = layout.locate(Site(module, role))  # type: ignore[attr-defined]
    return float(np.nanmax(arrays[f"{'weight_amax' if role == 'weight' else 'amax'}/{array.key}"][place]))
