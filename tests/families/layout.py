"""What a tiny model's folder holds, written down by hand: each tensor's hub name, shape and kind."""

from dataclasses import dataclass, field
from typing import Any, Literal

Kind = Literal["linear", "norm", "embedding", "conv", "vector", "experts"]
Shape = tuple[int, ...]


@dataclass(frozen=True)
class Tensor:
    """One tensor of the hub. `linear` is a matrix [out, in] that an engine may read quantized, `experts` one
    that holds all experts of a layer; embeddings, convolutions, norms and other vectors are never
    quantized."""

    shape: Shape
    kind: Kind
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    around: float = 0.0


@dataclass(frozen=True)
class Fused:
    """How a hub tensor that holds a projection of all experts comes apart.

    `parts` are the projections that one expert's matrix holds: `gate` and `up` in halves of the rows, one
    after the other or row by row in turn. `transposed` tensors are [expert, in, out]. `expert` is the name
    that an engine asks for, with `{expert}` and `{part}`; None where an export keeps the tensor as it is on
    the hub.
    """

    parts: tuple[str, ...]
    expert: str | None
    transposed: bool = False
    interleaved: bool = False


@dataclass
class Layout:
    """The tensors of one folder, collected name by name."""

    tensors: dict[str, Tensor] = field(default_factory=dict)
    fused: dict[str, Fused] = field(default_factory=dict)

    def linear(self, name: str, rows: int, columns: int, bias: bool = False, dtype: Any = "bfloat16") -> None:
        """The matrix of an `nn.Linear`, [rows, columns], and its bias."""
        self._add(f"{name}.weight", Tensor((rows, columns), "linear", dtype))
        if bias:
            self._add(f"{name}.bias", Tensor((rows,), "vector"))

    def norm(
        self, name: str, width: int, bias: bool = False, around: float = 1.0, dtype: Any = "bfloat16"
    ) -> None:
        """The weight of a norm. Those that multiply by (1 + weight) lie around zero."""
        self._add(f"{name}.weight", Tensor((width,), "norm", dtype, around))
        if bias:
            self._add(f"{name}.bias", Tensor((width,), "vector", dtype))

    def embedding(self, name: str, rows: int, width: int) -> None:
        """A table of vectors."""
        self._add(f"{name}.weight", Tensor((rows, width), "embedding"))

    def conv(self, name: str, *shape: int, bias: bool = False) -> None:
        """The kernel of a convolution."""
        self._add(f"{name}.weight", Tensor(shape, "conv"))
        if bias:
            self._add(f"{name}.bias", Tensor((shape[0],), "vector"))

    def vector(self, name: str, *shape: int, around: float = 0.0, dtype: Any = "bfloat16") -> None:
        """Any other tensor, under its whole name."""
        self._add(name, Tensor(shape, "vector", dtype, around))

    def experts(self, name: str, shape: Shape, fused: Fused) -> None:
        """A projection of all experts of a layer in one tensor, under its whole name."""
        self._add(name, Tensor(shape, "experts"))
        self.fused[name] = fused

    def _add(self, name: str, tensor: Tensor) -> None:
        if name in self.tensors:
            raise ValueError(f"{name} is written down twice")
        self.tensors[name] = tensor


@dataclass(frozen=True)
class Family:
    """One tiny model as the hub would hold it.

    `unbuilt` are patterns of names that transformers' class never makes (fnmatch). `stored` says how matrices
    lie in the file where that is not the model's dtype; `quantized` are patterns of those that it concerns.
    `loading_shown`: there is evidence of an engine that loads such an export. `runs`: transformers' class
    computes a forward in bfloat16.
    """

    name: str
    config: dict[str, Any]
    layout: Layout
    unbuilt: tuple[str, ...] = ()
    stored: Literal["plain", "fp8_block", "fp8_tensor", "fp8_channel", "mxfp4", "int4"] = "plain"
    quantized: tuple[str, ...] = ()
    files: dict[str, str] = field(default_factory=dict)
    loading_shown: bool = True
    runs: bool = True
