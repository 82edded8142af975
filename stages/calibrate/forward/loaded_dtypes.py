"""Whether a model's code bears the dtypes that its weights have once they are loaded.

Classes of transformers keep some parameters in float32 whatever the model's dtype is. Some can't compute with
what they then hold, which a model that is built without weights does not show by itself.
"""

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedModel

PRODUCTS: frozenset[Callable[..., Any]] = frozenset(
    {nn.functional.linear, torch.matmul, torch.Tensor.matmul, torch.Tensor.__matmul__, torch.mm, torch.bmm}
)


def kept_wide(model: PreTrainedModel) -> list[nn.Parameter]:
    """The parameters that loading gives another dtype than the model's own."""
    plan = model._get_dtype_plan(model.dtype)
    patterns = [re.compile(name.replace("*", ".*")) for name in plan]
    return [
        parameter
        for name, parameter in model.named_parameters()
        if parameter.dtype == model.dtype and any(pattern.search(name) for pattern in patterns)
    ]


@contextmanager
def in_float32(parameters: list[nn.Parameter]) -> Iterator[None]:
    """Within the context parameters on the meta device are float32, and products of two dtypes fail as they
    do elsewhere (RuntimeError).
    """
    before = [parameter.dtype for parameter in parameters]
    for parameter in parameters:
        parameter.data = parameter.data.to(torch.float32)
    try:
        with _SameDtype():
            yield
    finally:
        for parameter, dtype in zip(parameters, before, strict=True):
            parameter.data = parameter.data.to(dtype)


class _SameDtype(TorchFunctionMode):
    """The meta device multiplies tensors of different dtypes, which no other does."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func in PRODUCTS and len(args) > 1 and args[0].dtype != args[1].dtype:
            raise RuntimeError(f"a product of {args[0].dtype} and {args[1].dtype}")
        return func(*args, **(kwargs or {}))
