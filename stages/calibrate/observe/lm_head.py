"""The output head is not computed: the logits of a batch can take more memory than all its layers."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from transformers import PreTrainedModel


@contextmanager
def without_logits(model: PreTrainedModel) -> Iterator[None]:
    """Within the context the output head hands back one column of zeros per token instead of a vocabulary of
    logits.
    """
    head = model.get_output_embeddings()
    if head is None:
        yield
        return

    def forward(hidden: torch.Tensor) -> torch.Tensor:
        return hidden.new_zeros((*hidden.shape[:-1], 1))

    head.forward = forward
    try:
        yield
    finally:
        del head.forward
