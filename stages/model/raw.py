"""The bytes of a torch tensor."""

import torch
from torch import Tensor


def raw_bytes(tensor: Tensor) -> memoryview:
    """The tensor's bytes in row-major order, without a copy where it lies so already."""
    flat = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
    return flat.numpy().data
