"""Rescaling literal tensors; and whole models, whose logits must not notice."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from stages.export.observed import Observed
from stages.export.rescale import Rescaling, folded, kept_apart, smoothed
from stages.fold.folds import FoldMap, FoldSite, Operand
from stages.fold.sites import fold_map
from stages.model.skeleton import load_config
from stages.model.text_model import TextModel
from state.errors import InputError
from tests.stages.fold import fold_models
from tests.stages.fold.fold_models import load_model, logits, read_tensors, save_model, write_tensors

NORM = FoldSite(
    "norm",
    "norm",
    2,
    (Operand("norm", "norm.weight", (2,)),),
    (Operand("q", "q.weight", (1, 2)), Operand("router", "router.weight", (1, 2))),
)
ALONE = FoldSite(
    "norm", "alone", 2, (Operand("alone", "alone.weight", (2,)),), (Operand("q", "q.weight", (1, 2)),)
)
VALUES = FoldSite(
    "v_to_o", "attn.v", 2, (Operand("attn.v", "attn.v.weight", (2, 1)),), (Operand("o", "o.weight", (1, 2)),)
)
BF16, F32 = torch.bfloat16, torch.float32
SCALE = torch.tensor([2.0, 4.0])


def observed(inputs: dict[str, Any], kv: dict[str, Any] | None = None) -> Observed:
    return Observed(
        {f"{name}.input_quantizer": torch.tensor(amax) for name, amax in inputs.items()},
        {name: torch.tensor(amax) for name, amax in (kv or {}).items()},
        {},
    )


class TestFolded:
    def made(self) -> Rescaling:
        folds = FoldMap({site.name: site for site in (NORM, VALUES)})
        norms = {"norm.weight": torch.tensor([1.0, 2.0], dtype=BF16)}
        return folded(BF16, folds, {"norm": SCALE, "attn.v": SCALE}, norms)

    def test_weights_are_packed_from_float32(self) -> None:
        made = self.made()
        weight = torch.tensor([[1.0, 1.0]], dtype=BF16)
        assert made.to_pack("q", weight).dtype == F32
        assert made.to_pack("q", weight).tolist() == [[2.0, 4.0]]
        assert made.to_pack("attn.v", torch.ones(2, 1)).tolist() == [[0.5], [0.25]]
        assert made.to_pack("other", weight).dtype == F32

    def test_what_is_not_quantized_keeps_its_dtype(self) -> None:
        made = self.made()
        router = made.to_store("router.weight", torch.tensor([[1.0, 3.0]], dtype=BF16))
        assert router.dtype == BF16 and router.tolist() == [[2.0, 12.0]]
        assert made.to_store("norm.weight", torch.empty(2)).tolist() == [0.5, 0.5]
        assert [made.changes(name) for name in ("router.weight", "norm.weight", "o.bias")] == [
            True,
            True,
            False,
        ]

    def test_observations_are_divided_by_channel(self) -> None:
        found = self.made().adapt(
            observed({"q": [2.0, 2.0], "o": [8.0, 8.0], "lm_head": 3.0}, {"attn.v_bmm_quantizer": [8.0, 8.0]})
        )
        assert {name: amax.tolist() for name, amax in found.inputs.items()} == {
            "q.input_quantizer": [1.0, 0.5],
            "o.input_quantizer": [4.0, 2.0],
            "lm_head.input_quantizer": 3.0,
        }
        assert found.kv["attn.v_bmm_quantizer"].tolist() == [4.0, 2.0]

    def test_one_amax_for_all_channels_is_refused(self) -> None:
        with pytest.raises(InputError, match=r"^q\.input_quantizer holds one amax for all channels"):
            self.made().adapt(observed({"q": 2.0}))

    def test_a_scale_that_the_norm_can_not_hold_is_refused(self) -> None:
        with pytest.raises(InputError, match="scale of norm is not one that the norm can hold"):
            folded(
                BF16,
                FoldMap({"norm": NORM}),
                {"norm": SCALE * 1.001},
                {"norm.weight": torch.ones(2, dtype=BF16)},
            )


class TestKeptApart:
    def made(self, site: FoldSite, columns: dict[str, int], fused: frozenset[str] = frozenset()) -> Rescaling:
        norm = {f"{site.name}.weight": torch.tensor([1.0, 2.0], dtype=BF16)}
        return kept_apart(BF16, FoldMap({site.name: site}), {site.name: SCALE}, norm, columns, fused)

    def test_a_norm_that_others_read_stays(self) -> None:
        made = self.made(NORM, {"q": 2})
        assert made.to_pack("q", torch.ones(1, 2, dtype=BF16)).tolist() == [[2.0, 4.0]]
        assert made.pre_quant_scale("q").tolist() == [0.5, 0.25]
        assert made.written == {"q"}
        assert not made.changes("norm.weight") and not made.changes("router.weight")

    def test_a_norm_that_only_quantized_linears_read_is_divided(self) -> None:
        made = self.made(ALONE, {"q": 2, "o": 3})
        assert made.to_store("alone.weight", torch.empty(2)).tolist() == [0.5, 0.5]
        assert made.to_pack("q", torch.ones(1, 2)).tolist() == [[2.0, 4.0]]
        assert made.written == {"o"} and made.pre_quant_scale("o").tolist() == [1.0, 1.0, 1.0]

    def test_fused_experts_never_share_it_with_the_norm(self) -> None:
        assert self.made(ALONE, {"q": 2}, frozenset({"q"})).written == {"q"}

    def test_observations_are_rounded_as_modelopt_rounds_them(self) -> None:
        found = self.made(ALONE, {"q": 2}).adapt(observed({"q": [1 + 2**-9, 3.0]}))
        assert found.inputs["q.input_quantizer"].tolist() == [0.5, 0.75]


def test_smoothed_weights_are_cast_back() -> None:
    made = smoothed(BF16, {"q": torch.tensor([3.0, 0.5])})
    weight = made.to_pack("q", torch.ones(1, 2, dtype=BF16))
    assert weight.dtype == BF16 and weight.tolist() == [[171 / 512, 2.0]]
    assert made.pre_quant_scale("q").dtype == BF16 and made.written == {"q"}


@pytest.mark.parametrize("model_type", ["llama", "qwen2_moe", "gemma2", "deepseek_v3"])
def test_a_model_with_its_formats_off_has_the_same_logits(model_type: str, tmp_path: Path) -> None:
    """Fold only: every weight as it would be packed, every other tensor as it would be stored."""
    model = save_model(model_type, tmp_path)
    tensors = read_tensors(tmp_path)
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    relations = fold_models.norm_consumers(model, list(tensors))
    folds = fold_map(shapes, TextModel.of(load_config(tmp_path)), relations)
    generator = torch.Generator().manual_seed(0)
    scales, norms = {}, {}
    for name, site in folds.sites.items():
        scales[name] = torch.exp2(torch.randint(-2, 3, (site.channels,), generator=generator).float())
        norms |= {part.tensor: tensors[part.tensor] for part in site.sources}
    made = folded(F32, folds, held(folds, scales, norms), norms)
    changed = {
        name: made.to_pack(name.removesuffix(".weight"), tensor)
        if tensor.dim() == 2 and name.endswith("proj.weight")
        else made.to_store(name, tensor)
        for name, tensor in tensors.items()
    }
    assert sum(not changed[name].equal(tensor) for name, tensor in tensors.items()) > 15
    expected = logits(model)
    write_tensors(tmp_path, changed)
    found = logits(load_model(tmp_path))
    assert ((found - expected).norm() / expected.norm()).item() < 1e-5


def held(folds: FoldMap, scales: dict[str, Tensor], norms: dict[str, Tensor]) -> dict[str, Tensor]:
    from stages.fold.folds import fold_norm

    return {
        name: fold_norm(norms[site.sources[0].tensor], scales[name], site.plus_one)[1]
        if site.kind == "norm"
        else scales[name]
        for name, site in folds.sites.items()
    }
