"""Single changes to a checkpoint."""

from collections.abc import Callable
from typing import Any

import torch

from tests.stages.verify.editable import Editable

Edit = Callable[[Editable], None]


def drop(prefix: str) -> Edit:
    return lambda content: content.drop(prefix)


def weight_alone(module: str) -> Edit:
    """The codes go, and their scales stay."""

    def edit(content: Editable) -> None:
        del content.tensors[f"{module}.weight"]

    return edit


def put(name: str, make: Callable[[torch.Tensor], torch.Tensor]) -> Edit:
    """A tensor is replaced by what is made of it."""

    def edit(content: Editable) -> None:
        content.tensors[name] = make(content.tensors[name])

    return edit


def put_value(name: str, value: float) -> Edit:
    return put(name, lambda tensor: torch.full_like(tensor, value))


def times(*names: str, factor: float) -> Edit:
    def edit(content: Editable) -> None:
        for name in names:
            content.tensors[name] = content.tensors[name] * factor

    return edit


def add(name: str, tensor: torch.Tensor) -> Edit:
    def edit(content: Editable) -> None:
        content.tensors[name] = tensor

    return edit


def one_scale(name: str, code: int) -> Edit:
    """One block scale, whose block has codes, gets another code."""

    def edit(content: Editable) -> None:
        codes = content.tensors[name.removesuffix("_scale")]
        used = (codes.unflatten(-1, (-1, 8)) & 0x77 != 0).any(-1).nonzero()[0]
        changed = content.tensors[name].clone()
        changed.view(torch.uint8)[used[0], used[1]] = code
        content.tensors[name] = changed

    return edit


def unlist(entry: str) -> Edit:
    def edit(content: Editable) -> None:
        assert entry in content.quantization["ignore"]
        content.ignore(lambda listed: [name for name in listed if name != entry])

    return edit


def enlist(entry: str) -> Edit:
    return lambda content: content.ignore(lambda listed: [*listed, entry])


def said(inline: dict[str, Any] | None = None, separate: dict[str, Any] | None = None) -> Edit:
    """Keys of either configuration get other values."""

    def edit(content: Editable) -> None:
        content.quantization.update(inline or {})
        content.separate.update(separate or {})

    return edit


def group_size(size: int) -> Edit:
    def edit(content: Editable) -> None:
        for part in content.quantization["config_groups"]["group_0"].values():
            if isinstance(part, dict):
                part["group_size"] = size
        content.separate["group_size"] = size

    return edit


def no_kv(content: Editable) -> None:
    del content.quantization["kv_cache_scheme"]
    content.separate["kv_cache_quant_algo"] = None


def no_kv_scales(content: Editable) -> None:
    for name in [name for name in content.tensors if name.endswith(("k_scale", "v_scale"))]:
        del content.tensors[name]


def plain_again(
    module: str, shape: tuple[int, int], keep: tuple[str, ...] = (), listed: bool = False
) -> Edit:
    """A quantized weight is replaced by a plain one; its scales go, but for some."""

    def edit(content: Editable) -> None:
        for name in [name for name in content.tensors if name.startswith(f"{module}.")]:
            if name.rpartition(".")[2] not in keep:
                del content.tensors[name]
        content.tensors[f"{module}.weight"] = torch.ones(shape, dtype=torch.bfloat16)
        if listed:
            content.ignore(lambda names: [*names, module])

    return edit


def no_config(content: Editable) -> None:
    del content.config["quantization_config"]
    del content.own["quantization"]


def swizzled(scale: torch.Tensor) -> torch.Tensor:
    """As kernels want block scales: padded to whole tiles of 128 rows and 4 columns."""
    padded = torch.zeros(128, -(-scale.shape[1] // 4) * 4, dtype=scale.dtype)
    padded.view(torch.uint8)[: len(scale), : scale.shape[1]] = scale.view(torch.uint8)
    return padded


def nan_code(tensor: torch.Tensor) -> torch.Tensor:
    changed = tensor.clone()
    changed.view(torch.uint8)[3, 5] = 0xFF
    return changed


def with_nan(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.index_fill(0, torch.tensor([3]), float("nan"))


def fewer_rows(module: str, rows: int) -> Edit:
    """A weight and its block scales lose their last rows together."""

    def edit(content: Editable) -> None:
        for leaf in ("weight", "weight_scale"):
            name = f"{module}.{leaf}"
            content.tensors[name] = content.tensors[name][:rows]

    return edit


def swap(one: str, other: str) -> Edit:
    """Two modules give each other all their tensors."""
    return lambda content: content.rename(one, other)


def other_nibbles(codes: torch.Tensor) -> torch.Tensor:
    return (codes << 4) | (codes >> 4)


def other_halves(codes: torch.Tensor) -> torch.Tensor:
    """Low nibbles hold the first half of a row, high ones the second: the order of another packing."""
    low, high = codes & 15, codes >> 4
    values = torch.stack([low, high], -1).flatten(-2)
    first, second = values.chunk(2, -1)
    return first | (second << 4)


def one_bit(tensor: torch.Tensor) -> torch.Tensor:
    changed = tensor.clone()
    changed.view(torch.uint8)[0, 0] ^= 1
    return changed
