"""What a weight format is: one class per format derives from this one and says all that is known of it.

A weight is `[..., N, K]` (leading axes: experts, or none). A format stores a code for each element, and a
scale for each block of `block_size` columns, for each row, or for the whole tensor; some have a second scale
for the whole tensor beside those of the blocks, here called the tensor scale. W = value * step, with `value`
on the format's grid and `step` what the stored scales multiply to.

The arithmetic is that of modelopt 0.47's packing, operation by operation, so that packing a solver's result
gives the same bytes; unlike its fake quantization it needs no CUDA.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar, Literal, NamedTuple, Self

import torch
from torch import Tensor

from stages.settings import ScaleChoice
from state.errors import InputError

CLIP_RATIOS = (0.75, 0.8, 0.85, 0.9, 0.95, 1.0)
"""GPTQ's candidates for a block's scale, relative to that of its amax."""


class StoredTensor(NamedTuple):
    """A tensor that a checkpoint holds for a weight: `MODULE.leaf`; dtype is safetensors' name for it."""

    leaf: str
    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class WeightFormat(ABC):
    """How one weight is stored.

    Attributes:
        block_size: columns that share a scale; 0 where a row or the whole tensor does.
        name: modelopt's name.
        grain: what one scale spans.
        bound: the grid's largest magnitude, that of a block's amax.
        standard_block: the block size that solvers search in.
        input_bound: what an input's amax is divided by to get its scale.
        scale_dtype: what block scales are stored in.
        tensor_leaf: leaf of the scale that spans the whole tensor, None for formats without one.
        shared_over: the weights that must have one tensor scale in common: those of every group that engines
            run as one matrix; the projections of an expert where the model class stores them as one
            parameter; none.
        candidates_count: the scales that `candidates` gives for one block.
        solvers: the solvers that can search a weight of this format.
        inputs: their scales are stored, or found by engines as they run; or inputs stay as they are.
        weight_axis: the axis along which modelopt's weight quantizer must have its scales; None: any.
        square: blocks span as many rows as columns.
        holds_together: whether a checkpoint may hold all experts of a layer in one tensor of this format, as
            modelopt's exporter does.
    """

    block_size: int

    name: ClassVar[str]
    grain: ClassVar[Literal["block", "row", "tensor"]]
    bound: ClassVar[float]
    standard_block: ClassVar[int] = 0
    input_bound: ClassVar[float]
    scale_dtype: ClassVar[torch.dtype] = torch.float32
    tensor_leaf: ClassVar[str | None] = None
    shared_over: ClassVar[Literal["engine groups", "fused experts"] | None] = None
    candidates_count: ClassVar[int] = len(CLIP_RATIOS)
    solvers: ClassVar[frozenset[str]] = frozenset()
    inputs: ClassVar[Literal["stored", "found", "plain"]] = "stored"
    weight_axis: ClassVar[int | None] = None
    square: ClassVar[bool] = False
    holds_together: ClassVar[bool] = False

    def with_blocks(self, block_size: int) -> Self:
        """The same format with blocks of another size."""
        return replace(self, block_size=block_size)

    def with_scales(self, scales: ScaleChoice) -> Self | None:
        """The same format with block scales chosen in another way; None where there is only one way."""
        return None

    @property
    def rows_together(self) -> int:
        """Rows that are packed together, since they share bytes or scales."""
        return self.block_size if self.square else 1

    @property
    def described(self) -> str:
        """The name, and the blocks where there are any."""
        return f"{self.name} in blocks of {self.block_size}" if self.block_size else self.name

    # Shapes

    @abstractmethod
    def stored(self, rows: int, columns: int) -> list[StoredTensor]:
        """All that a checkpoint holds for a weight `[rows, columns]`, the codes under `weight` first."""

    def refuse(self, name: str, shape: tuple[int, ...]) -> None:
        """Raise InputError unless whole blocks and whole bytes hold the weight `name`, [rows, columns]."""
        if self.block_size and shape[1] % self.block_size:
            raise InputError(
                f"{name} has {shape[1]} input channels, which {self.name} blocks of {self.block_size} "
                "do not divide; choose a recipe that leaves this module unquantized"
            )

    def blocks(self, weights: Tensor) -> Tensor:
        """View `[..., N, K]` as `[..., N, blocks, block]`; without blocks the row is one.

        Raises ValueError where K is no multiple of the block size: no engine takes a partial block.
        """
        columns = weights.shape[-1]
        size = self.block_size or columns
        if columns % size:
            raise ValueError(
                f"{self.name} needs a multiple of {size} input features, this weight has {columns}; "
                "leave the linear out of the recipe or choose another format"
            )
        return weights.unflatten(-1, (columns // size, size))

    # Grid and scales, for solvers: batched, on any device

    @abstractmethod
    def round(self, x: Tensor) -> Tensor:
        """The nearest values on the grid."""

    def round_input(self, x: Tensor, scale: Tensor) -> Tensor:
        """What an engine multiplies with for an input x, `[..., K]` of any float dtype, under the stored
        input scale, f32 `[]`; in x's dtype.
        """
        raise NotImplementedError(f"the inputs of {self.name} can't be simulated")

    @abstractmethod
    def decode(self, codes: Tensor) -> Tensor:
        """Codes as a checkpoint holds them, or their bytes as int8, to values on the grid, f32 `[..., N,
        K]`."""

    def search_scale(self, weights: Tensor, amax: Tensor | None = None) -> Tensor | None:
        """The tensor scale that solvers divide block scales by: f32 `[..., 1, 1]`; None for formats whose
        block scales stand alone.

        Args:
            weights: `[..., N, K]`; the linears of a fusion group are concatenated along N, so that they share
                it.
            amax: `[..., 1, 1]` taken instead of max|weights| (a clipped one, or that of a larger group).
        """
        return None

    def scales_from_amax(self, amax: Tensor, tensor_scale: Tensor | None) -> Tensor:
        """Block amax to stored scales, as modelopt rounds them.

        Args:
            amax: f32 `[..., N, blocks]`; a row's `[..., N, 1]`; a tensor's `[..., 1, 1]`.
        An amax of zero gets scale 1: any finite scale decodes its zeros.
        """
        return (amax / self.bound).masked_fill_(~(amax > 0), 1.0)

    def block_amax(self, weights: Tensor) -> Tensor:
        """The amax each stored scale comes from: shapes as in `scales_from_amax`."""
        if self.grain == "tensor":
            return tensor_amax(weights)
        return self.blocks(weights).abs().amax(-1).float()

    def candidates(self, amax: Tensor, tensor_scale: Tensor | None) -> Tensor:
        """Scales that GPTQ tries for one block: amax f32 `[E, N]`, tensor scale f32 `[E, 1, 1]` → f32
        `[C, E, N]`.
        """
        return torch.stack([self.scales_from_amax(amax * ratio, None) for ratio in CLIP_RATIOS])

    def every_scale(self) -> Tensor | None:
        """All scales that can be stored for a block, ascending: f32 `[S]`; None where they are too many to be
        tried one by one.
        """
        return None

    # Kernels: None where torch's functions do the work on a GPU too

    def error_on_gpu(self, weights: Tensor, scales: Tensor, tensor_scale: Tensor | None) -> Tensor | None:
        """Q(W s)/s - W in one kernel: weights `[E, N, K]`, scales `[A, E, K]`, tensor scale `[A, E, 1, 1]` →
        bf16 `[A, E, N, K]`.
        """
        return None

    def clip_on_gpu(
        self, weights: Tensor, within: Tensor, tensor_scale: Tensor | None, ratios: Tensor
    ) -> tuple[Tensor, Tensor] | None:
        """The best ratio of each block in one kernel: its amax and its loss, f32 `[E, N, blocks]`.

        Args:
            weights: `[E, N, K]`. within: H's blocks on the diagonal, f32 `[E, blocks, block, block]`.
        """
        return None

    def sweep_on_gpu(
        self, weights: Tensor, within: Tensor, tensor_scale: Tensor | None, scales: Tensor
    ) -> tuple[Tensor, Tensor] | None:
        """The best scale of each block in one kernel, and its loss, as in `clip_on_gpu`: scales f32 `[S]`."""
        return None

    def gptq_on_gpu(
        self, columns: Tensor, factor: Tensor, tensor_scale: Tensor | None, fixed: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor] | None:
        """`solve_block` of stages/solve/gptq.py in one kernel."""
        return None

    def weights_on_gpu(
        self, latents: Tensor, scale: Tensor, tensor_scale: Tensor | None, dtype: torch.dtype
    ) -> Tensor | None:
        """`Latent.weights` of stages/solve/rounding.py in one kernel."""
        return None

    # Sources in MXFP4, whose scales are powers of two, one for each 32 values of a row

    def powers_amax(self, largest: Tensor) -> Tensor | None:
        """The amax of a whole weight under which its powers of two, up to the largest, are kept as block
        scales: f32 `[]`; None for formats that can't keep them.
        """
        return None

    def powers_block_amax(self, powers: Tensor) -> Tensor:
        """The amax of every block that keeps its power: f32 `[N, K/32]` → `[N, K/block]`."""
        raise NotImplementedError(f"{self.name} can't keep powers of two")

    def holds_powers(self, powers: Tensor, tensor_scale: Tensor) -> Tensor:
        """Whether values that powers scale come out the same beside a tensor scale: bool, of their shape."""
        raise NotImplementedError(f"{self.name} can't keep powers of two")

    # Checkpoints

    def input_scale(self, amax: Tensor) -> Tensor:
        """The scale of an input with this amax: f32 `[]`."""
        return amax / self.input_bound

    def tensor_scale(self, amax: Tensor) -> Tensor:
        """What is stored under `tensor_leaf` for a weight with this amax: f32 `[]`."""
        raise NotImplementedError(f"{self.name} has no scale for the whole tensor")

    @abstractmethod
    def block_scale(
        self, weight: Tensor, tensor_scale: Tensor | None, block_amax: Tensor | None = None
    ) -> Tensor | None:
        """What is stored under `weight_scale` beside a tensor scale, None for formats without it.

        Args:
            weight: `[N, K]` in bf16, f16 or f32.
            tensor_scale: f32 `[]`, for formats that have one.
            block_amax: f32 `[N, blocks]`, where a solver clips each block; else the blocks' own.
        """

    @abstractmethod
    def pack(self, weight: Tensor, tensor_scale: Tensor | None, block_scale: Tensor | None) -> Tensor:
        """The codes of a weight `[N, K]` as a checkpoint holds them, rounded under given scales. Experts in
        one tensor come as `[E, N, K]`: modelopt may divide those in another dtype.
        """

    @abstractmethod
    def encode(self, values: Tensor) -> Tensor:
        """The codes of values on the grid, f32 `[..., N, K]`, as a checkpoint holds them."""

    @abstractmethod
    def dequantize(self, stored: Mapping[str, Tensor]) -> Tensor:
        """The weight an engine computes with: f32 `[N, K]`, from what `stored` lists, by leaf."""


def tensor_amax(weights: Tensor) -> Tensor:
    """max|W| of each matrix: f32 `[..., 1, 1]`."""
    return weights.abs().amax(dim=(-2, -1), keepdim=True).float()
