"""K and V as attention sees them: after rotary embedding, before any repetition over query heads.

transformers dispatches attention through a public registry, by the implementation's name. What the registry
hands out is wrapped, and the name stays: models ask for it (some build a sparse mask for "sdpa" and "eager"
alone), and masks are looked up by it.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import wraps
from typing import Any

import torch
from torch import nn
from transformers.masking_utils import AttentionMaskInterface
from transformers.modeling_utils import AttentionInterface

KvObserver = Callable[[nn.Module, torch.Tensor, torch.Tensor], None]


@contextmanager
def observed_attention(observe: KvObserver, masks_on_meta: bool = False) -> Iterator[None]:
    """Within the context, call `observe(attention_module, k, v)` with [batch, kv_heads, tokens, head_dim] at
    every attention of every model.

    The attention itself is the implementation the model has; its outputs are untouched. masks_on_meta: build
    masks on the meta device too, for models that look at them; mostly that fails for want of values.
    """

    def watched(attend: Callable[..., Any]) -> Callable[..., Any]:
        if getattr(attend, "is_watched", False):  # `get_interface` looks up by `__getitem__`
            return attend

        @wraps(attend)
        def forward(
            module: nn.Module,
            query: torch.Tensor,
            key: torch.Tensor,
            value: torch.Tensor,
            *args: Any,
            **kwargs: Any,
        ) -> Any:
            observe(module, key, value)
            return attend(module, query, key, value, *args, **kwargs)

        forward.is_watched = True  # type: ignore[attr-defined]
        return forward

    with ExitStack() as stack:
        stack.enter_context(_results_changed(AttentionInterface, "get_interface", watched))
        stack.enter_context(_results_changed(AttentionInterface, "__getitem__", watched))
        if not masks_on_meta:
            stack.enter_context(_results_changed(AttentionMaskInterface, "__getitem__", _unless_on_meta))
        yield


@contextmanager
def _results_changed(
    cls: type, name: str, change: Callable[[Callable[..., Any]], Callable[..., Any]]
) -> Iterator[None]:
    """Within the context, a method that looks functions up returns them changed."""
    own, method = cls.__dict__.get(name), getattr(cls, name)

    def lookup(*args: Any) -> Callable[..., Any]:
        return change(method(*args))

    setattr(cls, name, lookup)
    try:
        yield
    finally:
        if own is None:
            delattr(cls, name)
        else:
            setattr(cls, name, own)


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
