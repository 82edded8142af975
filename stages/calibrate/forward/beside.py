"""A GPU stream beside the one on which the layers are queued.

transformers looks at values when it builds masks, and so does the comparison of a layer's arguments. On the
layers' own stream each look would have the CPU wait for every layer queued before it, and then the GPU for
the CPU. On a CPU nothing here does anything.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import cache

import torch


class Beside:
    """The stream beside the one that is current where this is made, which is called the main one here."""

    def __init__(self, device: torch.device) -> None:
        self._main: torch.cuda.Stream | None = None
        self._stream: torch.cuda.Stream | None = None
        if device.type == "cuda":
            self._main = torch.cuda.current_stream(device)
            self._stream = _stream(device)

    @contextmanager
    def run(self) -> Iterator[None]:
        """What is called within goes on the stream beside."""
        with torch.cuda.stream(self._stream):
            yield

    def follow(self, tensors: Iterable[torch.Tensor] = ()) -> None:
        """What is run from here on comes after all that is queued on the main stream, and may use `tensors`,
        which were made there."""
        _order(self._main, self._stream, tensors)

    def join(self, tensors: Iterable[torch.Tensor] = ()) -> None:
        """The main stream goes on after all that was run here, and may use `tensors`, which were made
        here."""
        _order(self._stream, self._main, tensors)


@cache
def _stream(device: torch.device) -> torch.cuda.Stream:
    """One for all: memory that a stream has let go of is kept for it. Its few small kernels go first, not
    behind the large ones of the layers.
    """
    return torch.cuda.Stream(device, priority=-1)


def _order(
    first: torch.cuda.Stream | None, then: torch.cuda.Stream | None, tensors: Iterable[torch.Tensor]
) -> None:
    if first is None or then is None:
        return
    then.wait_stream(first)
    for tensor in tensors:
        if tensor.is_cuda:
            tensor.record_stream(then)  # their memory isn't used again before `then` is done with it
