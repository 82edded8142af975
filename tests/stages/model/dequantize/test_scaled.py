"""Codes and scales to numbers, by literal values; and every scheme as its own reference has it."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from stages.model.dequantize import scaled
from stages.model.dequantize.codes import E2M1, E4M3, INT4, Code
from stages.model.dequantize.scaled import ScaledWeight
from state.source import Source


def weight(
    code: Code = E4M3,
    size: tuple[int, int] = (1, 2),
    grid: tuple[int, int] = (1, 1),
    block: tuple[int, int] = (128, 128),
    **more: object,
) -> ScaledWeight:
    fields = {"experts": None, "exponents": False, "dtype": torch.bfloat16} | more
    return ScaledWeight("codes", "scale", code, *size, grid=grid, block=block, **fields)  # type: ignore[arg-type]


def source(folder: Path, codes: torch.Tensor, scale: torch.Tensor) -> Source:
    save_file({"codes": codes.contiguous(), "scale": scale.contiguous()}, folder / "model.safetensors")
    return Source.open(folder)


def fp8(rows: int, columns: int) -> torch.Tensor:
    values = torch.ones(rows, columns)
    values[:, 1::2] = -0.5
    return values.to(torch.float8_e4m3fn)


@pytest.mark.parametrize("at_once", [1, 1 << 24])
def test_fp8_blocks_with_partial_edges(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at_once: int) -> None:
    monkeypatch.setattr(scaled, "AT_ONCE", at_once)
    given = source(tmp_path, fp8(130, 200), torch.tensor([[2.0, 4.0], [8.0, 16.0]]))
    found = weight(size=(130, 200), grid=(2, 2)).read(given)
    expected = torch.ones(130, 200)
    expected[:, 1::2] = -0.5
    expected[:128, :128] *= 2.0
    expected[:128, 128:] *= 4.0
    expected[128:, :128] *= 8.0
    expected[128:, 128:] *= 16.0
    assert found.dtype == torch.bfloat16 and found.float().equal(expected)


def test_the_product_is_rounded_once(tmp_path: Path) -> None:
    # 1.0 * 1.001 is no bfloat16: its neighbours are 1 and 1.0078125.
    given = source(tmp_path, fp8(1, 2), torch.tensor([[1.001]]))
    assert weight().read(given).tolist() == [[1.0, -0.5]]
    assert weight(dtype=torch.float32).read(given)[0, 0].item() == pytest.approx(1.001, rel=1e-7)


def test_per_channel_and_per_tensor(tmp_path: Path) -> None:
    given = source(tmp_path, fp8(2, 4), torch.tensor([2.0, 4.0]))
    rows = weight(size=(2, 4), grid=(2, 1), block=(1, 4))
    assert rows.read(given).tolist() == [[2.0, -1.0, 2.0, -1.0], [4.0, -2.0, 4.0, -2.0]]
    assert rows.described == "FP8 per channel"
    one = weight(size=(2, 4), block=(2, 4))
    assert one.read(source(tmp_path, fp8(2, 4), torch.tensor(2.0))).tolist() == [[2.0, -1.0, 2.0, -1.0]] * 2
    assert one.described == "FP8 per tensor"


def test_exponents(tmp_path: Path) -> None:
    scale = torch.tensor([[127 + 3, 127 - 2]], dtype=torch.uint8)
    given = source(tmp_path, fp8(1, 4), scale)
    found = weight(size=(1, 4), grid=(1, 2), block=(1, 2), exponents=True)
    assert found.read(given).tolist() == [[8.0, -4.0, 0.25, -0.125]]


def test_experts_one_and_all(tmp_path: Path) -> None:
    given = source(tmp_path, torch.stack([fp8(2, 2), fp8(2, 2)]), torch.tensor([[[1.0]], [[2.0]]]))
    found = weight(size=(2, 2), experts=2)
    assert found.read(given).tolist() == [[[1.0, -0.5]] * 2, [[2.0, -1.0]] * 2]
    assert found.read(given, 1).tolist() == [[2.0, -1.0]] * 2


def test_fp4_pairs_are_low_nibble_first(tmp_path: Path) -> None:
    # Codes: 1 is 0.5, 7 is 6, 9 is -0.5, 10 is -1.
    codes = torch.tensor([[0x71, 0xA9]], dtype=torch.uint8)
    given = source(tmp_path, codes, torch.tensor([[128]], dtype=torch.uint8))
    found = weight(E2M1, (1, 4), block=(1, 32), exponents=True)
    assert found.read(given).tolist() == [[1.0, 12.0, -1.0, -2.0]]


def test_mxfp4_is_what_transformers_makes_of_it(tmp_path: Path) -> None:
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    generator = torch.Generator().manual_seed(0)
    blocks = torch.randint(0, 256, (2, 6, 3, 16), dtype=torch.uint8, generator=generator)
    scales = torch.randint(90, 140, (2, 6, 3), dtype=torch.uint8, generator=generator)
    given = source(tmp_path, blocks, scales)
    found = weight(E2M1, (6, 96), grid=(6, 3), block=(1, 32), exponents=True, experts=2, transposed=True)
    expected = convert_moe_packed_tensors(blocks, scales)
    assert tuple(expected.shape) == (2, 96, 6) and expected.dtype == torch.bfloat16
    assert found.read(given).equal(expected)
    assert found.read(given, 1).equal(expected[1])


def test_fp8_is_what_transformers_makes_of_it(tmp_path: Path) -> None:
    from transformers.integrations.finegrained_fp8 import Fp8Dequantize

    generator = torch.Generator().manual_seed(0)
    codes = torch.randn(256, 384, generator=generator).to(torch.float8_e4m3fn)
    scale = torch.rand(2, 3, generator=generator)
    expected = Fp8Dequantize(None)._dequantize_one(codes, scale, torch.bfloat16)
    assert weight(size=(256, 384), grid=(2, 3)).read(source(tmp_path, codes, scale)).equal(expected)


def test_int4_groups(tmp_path: Path) -> None:
    # Eight to a word, the first column lowest, stored plus 8: -8 .. -1, then 0 .. 3 and four that fill up.
    words = [0x76543210, 0x8888BA98]
    codes = torch.tensor([[word - (1 << 32) if word >= 1 << 31 else word for word in words]]).int()
    given = source(tmp_path, codes, torch.tensor([[1.0, 0.5, 2.0]]))
    found = weight(INT4, (1, 12), grid=(1, 3), block=(1, 4))
    assert found.read(given).tolist() == [
        [-8.0, -7.0, -6.0, -5.0, -2.0, -1.5, -1.0, -0.5, 0.0, 2.0, 4.0, 6.0]
    ]
    assert found.described == "INT4 in groups of 4"
