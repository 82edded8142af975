"""The bytes of a tensor."""

import torch

from stages.model.raw import raw_bytes


def test_raw_bytes_are_row_major() -> None:
    matrix = torch.tensor([[1, 2], [3, 4]], dtype=torch.uint8)
    assert bytes(raw_bytes(matrix.T)) == bytes([1, 3, 2, 4])
    assert bytes(raw_bytes(torch.tensor([1.0], dtype=torch.bfloat16))) == b"\x80\x3f"
