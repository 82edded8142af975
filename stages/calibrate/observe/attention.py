"""K and V as attention sees them: after rotary embedding, before any repetition over query heads.

transformers dispatches attention through a public registry. A wrapper registered there sees K and V; the mask
function of the wrapped implementation has to be registered under the same name, or sliding windows silently
lose their mask.
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

KvObserver = Callable[[nn.Module, torch.Tensor, torch.Tensor], None]


@contextmanager
def observed_attention(model: PreTrainedModel, observe: KvObserver) -> Iterator[None]:
    """Within the context, call `observe(attention_module, k, v)` with [batch, kv_heads, tokens, head_dim] at
    every attention.

    The attention itself is the implementation the model had before; its outputs are untouched.
    """
    before = model.config._attn_implementation or "eager"
    name = f"holdfast_{before}"

    def forward(
        module: nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        observe(module, key, value)
        return _implementation(before, module)(module, query, key, value, *args, **kwargs)

    ALL_ATTENTION_FUNCTIONS.register(name, forward)
    ALL_MASK_ATTENTION_FUNCTIONS.register(name, _unless_on_meta(ALL_MASK_ATTENTION_FUNCTIONS[before]))
    model.set_attn_implementation(name)
    try:
        yield
    finally:
        model.set_attn_implementation(before)
        # The registries have no way to take an entry back; what it refers to must not outlive the context.
        ALL_ATTENTION_FUNCTIONS._global_mapping.pop(name)
        ALL_MASK_ATTENTION_FUNCTIONS._global_mapping.pop(name)


def _implementation(name: str, module: nn.Module) -> Callable[..., Any]:
    """The registered attention function, or for `eager` the one in the module's own source file."""
    if name in ALL_ATTENTION_FUNCTIONS:
        registered: Callable[..., Any] = ALL_ATTENTION_FUNCTIONS[name]
        return registered
    for cls in type(module).__mro__:  # a class made by modelopt at run time has its origin further up
        own: Callable[..., Any] | None = getattr(sys.modules[cls.__module__], "eager_attention_forward", None)
        if own is not None:
            return own
    raise LookupError(f"{type(module).__name__} has no eager_attention_forward")


def _unless_on_meta(build: Callable[..., Any]) -> Callable[..., Any]:
    """A mask function that builds none on the meta device, which has no values to build one from. A model may
    be in several places: a tower that is never loaded stays on meta.
    """

    def mask(*args: Any, **kwargs: Any) -> Any:
        device = kwargs.get("device")
        return None if device is not None and device.type == "meta" else build(*args, **kwargs)

    return mask


def channels_last(tensor: torch.Tensor) -> torch.Tensor:
    """[batch, heads, tokens, head_dim] → [batch · tokens, heads · head_dim], one channel per head and
    dimension.
    """
    batch, heads, tokens, size = tensor.shape
    return tensor.transpose(1, 2).reshape(batch * tokens, heads * size)
