"""What differs between an export and modelopt's own of the same model, calibrated on the same tokens."""

import contextlib
import io
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from tests.families.checkpoint import Checkpoint
from tests.families.expected import unbuilt
from tests.families.judge import Case, named, siblings
from tests.families.replay import content, load

RECIPES = ("fp8", "general/ptq/nvfp4_default-kv_fp8")

EXPERTS_ROUND = 0.01
"""modelopt runs experts one after the other, which rounds differently: in a mixture, what is observed behind
the first experts may differ by that much."""

OBSERVED = (".input_scale", ".k_scale", ".v_scale", "_input_scale")


def export_by_modelopt(case: Case, plain: Path, recipe: str, batches: list[torch.Tensor], out: Path) -> None:
    """Quantize, calibrate and export the plain folder with modelopt alone."""
    import modelopt.torch.quantization as mtq
    from modelopt.recipe import load_recipe
    from modelopt.recipe.presets import QUANT_CFG_CHOICES
    from modelopt.torch.export import export_hf_checkpoint

    def forward(model: Any) -> None:
        for batch in batches:
            model(input_ids=batch, use_cache=False)

    with quiet(), torch.inference_mode():
        config = QUANT_CFG_CHOICES.get(recipe) or load_recipe(recipe).quantize.model_dump(exclude_unset=True)
        model = mtq.quantize(load(case.family, plain, torch.bfloat16), config, forward)
        export_hf_checkpoint(model, export_dir=out)


def differences(case: Case, ours: Checkpoint, theirs: Checkpoint) -> Iterator[str]:
    """Tensors and excluded modules that differ, but for the differences of choice in docs/parity.md.
    Modules that modelopt names as the class has them, where the hub names them otherwise, are left out."""
    mixture = any("expert" in name for name in ours.tensors)
    whole = {f"{module}." for module in kept_whole(case, ours)}
    for name in sorted(set(ours.tensors) | set(theirs.tensors)):
        if name.startswith(tuple(whole)):
            continue
        if name not in ours.tensors:
            yield f"only modelopt writes {name}"
        elif name not in theirs.tensors:
            if not (name in case.weights and unbuilt(case.family, name)):
                yield f"modelopt does not write {name}"
        elif not _agree(name, ours.tensors[name], theirs.tensors[name], mixture):
            yield f"{name} is not modelopt's"
    modules = {name.removesuffix(".weight") for name in case.weights}
    for excluded in theirs.exclude:
        module = excluded.partition("\0")[
            0
        ]  # modelopt leaves a sentinel of its own behind names it has changed
        if module in modules and not named(module, ours.exclude):
            yield f"only modelopt excludes {module}"


def kept_whole(case: Case, ours: Checkpoint) -> Iterator[str]:
    """Modules left unquantized because engines fuse them with one that no class builds."""
    modules = {name.removesuffix(".weight") for name in case.weights}
    for module in modules:
        beside = [member for members in siblings(module, modules) for member in members]
        if not ours.quantized(module) and any(unbuilt(case.family, f"{one}.weight") for one in beside):
            yield module


def in_hub_names(case: Case, theirs: Checkpoint) -> bool:
    """Whether modelopt's export has the hub's names at all: for some wrappers it keeps those of the class."""
    linears = {name for name, tensor in case.family.layout.tensors.items() if tensor.kind == "linear"}
    return any(name in theirs.tensors for name in linears)


def _agree(name: str, ours: torch.Tensor, theirs: torch.Tensor, mixture: bool) -> bool:
    if ours.shape != theirs.shape and ours.numel() != 1:
        return False
    if name.endswith(OBSERVED) and mixture:
        return bool((ours - theirs).abs().max() <= EXPERTS_ROUND * theirs.abs().max())
    if {ours.dtype, theirs.dtype} == {torch.float32, torch.bfloat16}:  # theirs has the dtype of the class
        ours, theirs = ours.to(torch.bfloat16), theirs.to(torch.bfloat16)
    return ours.dtype == theirs.dtype and content(ours.reshape(-1)) == content(theirs.reshape(-1))


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Within, modelopt says nothing."""
    with (
        warnings.catch_warnings(),
        contextlib.redirect_stdout(io.StringIO()),
        contextlib.redirect_stderr(io.StringIO()),
    ):
        warnings.simplefilter("ignore")
        yield
