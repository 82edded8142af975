"""The largest |x| that each matrix sees, and each layer's K and V, from an own forward of the source.

transformers computes the forward; what is read are the arguments of the functions that multiply. A matrix is
known by its bytes, so that no name of the class, of the product or of a conversion takes part.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from torch.overrides import TorchFunctionMode

from tests.families.expected import Matrix, matrices
from tests.families.layout import Family

LINEAR = {torch.nn.functional.linear}
GROUPED = {torch._grouped_mm, torch.nn.functional.grouped_mm}
PRODUCTS = {torch.bmm, torch.matmul, torch.Tensor.matmul, torch.Tensor.__matmul__, torch.Tensor.bmm}
LAYER = re.compile(r"(?:layers|h)\.(\d+)\.")


@dataclass
class Seen:
    """Module in the export's names -> largest |x|; layer -> largest |k| and |v|."""

    inputs: dict[str, float] = field(default_factory=dict)
    keys: dict[int, float] = field(default_factory=dict)
    values: dict[int, float] = field(default_factory=dict)

    def note(self, module: str, rows: torch.Tensor) -> None:
        """Take the rows that reached a module into account."""
        if rows.numel():
            self.inputs[module] = max(self.inputs.get(module, 0.0), float(rows.abs().max()))


class Reading(TorchFunctionMode):
    """Reads the arguments of every product with a known matrix, and of every attention."""

    def __init__(self, model: torch.nn.Module, known: dict[bytes, str], eager: bool) -> None:
        super().__init__()
        self.seen = Seen()
        self._known = known
        self._eager = eager
        self._parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
        self._names: dict[tuple[Any, ...], tuple[list[str], torch.Tensor]] = {}
        self._layer = -1
        self._keys_next = True

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in LINEAR:
            self._matrix(args[0], args[1] if len(args) > 1 else kwargs["weight"])
        elif func in GROUPED:
            self._grouped(args[0], args[1], kwargs["offs"] if "offs" in kwargs else args[2])
        elif func in PRODUCTS:
            self._product(args[0], args[1])
        elif func is torch.nn.functional.scaled_dot_product_attention:
            key, value = (args[i] if len(args) > i else kwargs[n] for i, n in ((1, "key"), (2, "value")))
            self._attention(key, value)
        return func(*args, **kwargs)

    def _matrix(self, rows: torch.Tensor, weight: torch.Tensor) -> None:
        for module in self._modules(weight):
            if found := LAYER.search(module):
                self._layer = int(found[1])
            self.seen.note(module, rows)

    def _grouped(self, rows: torch.Tensor, weight: torch.Tensor, ends: torch.Tensor) -> None:
        start = 0
        for expert, end in enumerate(ends.tolist()):
            for module in self._modules(weight[expert].transpose(0, 1)):
                self.seen.note(module, rows[start:end])
            start = end

    def _product(self, left: torch.Tensor, right: torch.Tensor) -> None:
        if right.untyped_storage().data_ptr() in self._parameters and right.ndim == 3:
            for expert, rows in enumerate(left):
                for module in self._modules(right[expert].transpose(0, 1)):
                    self.seen.note(module, rows)
        elif right.untyped_storage().data_ptr() in self._parameters and right.ndim == 2:
            self._matrix(left, right.transpose(0, 1))
        elif self._eager and left.ndim == right.ndim == 4:
            which = self.seen.keys if self._keys_next else self.seen.values
            which[self._layer] = max(which.get(self._layer, 0.0), float(right.abs().max()))
            self._keys_next = not self._keys_next

    def _attention(self, key: torch.Tensor, value: torch.Tensor) -> None:
        for which, states in ((self.seen.keys, key), (self.seen.values, value)):
            which[self._layer] = max(which.get(self._layer, 0.0), float(states.abs().max()))

    def _modules(self, weight: torch.Tensor) -> list[str]:
        """The modules whose matrix this is, or whose rows are halves of it."""
        if weight.untyped_storage().data_ptr() not in self._parameters:
            return []
        key = (weight.data_ptr(), weight.shape, weight.stride())
        if key not in self._names:
            shares = [weight, *weight.chunk(2), weight[0::2], weight[1::2]]
            names = [self._known[found] for share in shares if (found := content(share)) in self._known]
            self._names[key] = (names, weight)
        return self._names[key][0]


def content(matrix: torch.Tensor) -> bytes:
    """The bytes of a matrix, row by row."""
    return matrix.detach().contiguous().view(torch.uint8).numpy().tobytes()


def replay(
    family: Family,
    weights: dict[str, torch.Tensor],
    folder: Path,
    batches: list[torch.Tensor],
    dtype: torch.dtype = torch.bfloat16,
) -> Seen:
    """Run the batches through transformers' own class. `folder` holds the weights in the hub's layout,
    without quantization."""
    model = load(family, folder, dtype)
    known = {}
    for found in matrices(family, weights).values():
        for matrix in found:
            known |= {content(share): name for share, name in _shares(matrix)}
    eager = model.config.get_text_config()._attn_implementation == "eager"
    with torch.inference_mode(), Reading(model, known, eager) as reading:
        for batch in batches:
            model(input_ids=batch, use_cache=False)
    return reading.seen


def load(family: Family, folder: Path, dtype: torch.dtype) -> torch.nn.Module:
    """The class that config.json names, with the grouped products that calibration uses."""
    built = getattr(transformers, family.config["architectures"][0])
    model: torch.nn.Module = built.from_pretrained(folder, dtype=dtype).eval()
    if hasattr(model, "set_experts_implementation") and model._can_set_experts_implementation():
        model.set_experts_implementation("grouped_mm")
    return model


def _shares(matrix: Matrix) -> list[tuple[torch.Tensor, str]]:
    if matrix.value.ndim == 3:
        return [(one, matrix.module) for one in matrix.value]
    return [(matrix.value, matrix.module)]
