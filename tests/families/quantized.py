"""How already quantized checkpoints store their matrices, written from the formats' definitions."""

from dataclasses import dataclass

import torch

FP8_LARGEST = 448.0
FP4_VALUES = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])


@dataclass(frozen=True)
class Stored:
    """The tensors that stand for one matrix in the file, and the bfloat16 matrix that they mean."""

    tensors: dict[str, torch.Tensor]
    meaning: torch.Tensor


def store(form: str, name: str, value: torch.Tensor) -> Stored:
    """A matrix in the form of the checkpoint. `name` ends in `.weight` but for experts that gpt-oss fuses."""
    forms = {
        "fp8_block": _fp8_block,
        "fp8_tensor": _fp8_tensor,
        "fp8_channel": _fp8_channel,
        "mxfp4": _mxfp4,
        "int4": _int4,
    }
    return forms[form](name, value)


def _fp8_block(name: str, value: torch.Tensor, side: int = 128) -> Stored:
    """e4m3 codes and a float32 scale per 128 x 128 block, as DeepSeek-V3 has them (`weight_scale_inv`)."""
    rows, columns = value.shape
    scales = torch.empty(-(-rows // side), -(-columns // side))
    codes = torch.empty(rows, columns, dtype=torch.float8_e4m3fn)
    meaning = torch.empty(rows, columns)
    for row in range(scales.shape[0]):
        for column in range(scales.shape[1]):
            block = slice(row * side, (row + 1) * side), slice(column * side, (column + 1) * side)
            scale = value[block].float().abs().max() / FP8_LARGEST
            scales[row, column] = scale
            codes[block] = (value[block].float() / scale).to(torch.float8_e4m3fn)
            meaning[block] = codes[block].float() * scale
    return Stored({name: codes, f"{name}_scale_inv": scales}, meaning.to(torch.bfloat16))


def _fp8_tensor(name: str, value: torch.Tensor) -> Stored:
    """e4m3 codes and one float32 scale (`weight_scale`), as compressed-tensors has them per tensor."""
    scale = (value.float().abs().max() / FP8_LARGEST).reshape(1)
    codes = (value.float() / scale).to(torch.float8_e4m3fn)
    return Stored({name: codes, f"{name}_scale": scale}, (codes.float() * scale).to(torch.bfloat16))


def _fp8_channel(name: str, value: torch.Tensor) -> Stored:
    """e4m3 codes and a bfloat16 scale [rows, 1], as compressed-tensors has them per channel."""
    scale = (value.float().abs().amax(1, keepdim=True) / FP8_LARGEST).to(torch.bfloat16)
    codes = (value.float() / scale.float()).clamp(-FP8_LARGEST, FP8_LARGEST).to(torch.float8_e4m3fn)
    meaning = codes.float() * scale.float()
    return Stored({name: codes, f"{name}_scale": scale}, meaning.to(torch.bfloat16))


def _mxfp4(name: str, value: torch.Tensor) -> Stored:
    """gpt-oss's experts: `value` [expert, in, out] is stored as [expert, out, in / 32, 16] bytes, low nibble
    first, with exponents [expert, out, in / 32] biased by 127."""
    rows = value.transpose(1, 2).float()
    blocks = rows.reshape(*rows.shape[:2], -1, 32)
    largest = blocks.abs().amax(-1).clamp(min=2.0**-100)
    exponents = torch.floor(torch.log2(largest)) - 2
    scaled = blocks / torch.exp2(exponents)[..., None]
    nearest = (scaled.abs()[..., None] - FP4_VALUES).abs().argmin(-1)
    codes = (nearest + 8 * (scaled < 0)).to(torch.uint8)
    packed = codes[..., 0::2] | codes[..., 1::2] << 4
    meaning = FP4_VALUES[nearest] * torch.where(scaled < 0, -1.0, 1.0) * torch.exp2(exponents)[..., None]
    whole = meaning.reshape(rows.shape).transpose(1, 2).contiguous()
    exponent_bytes = (exponents + 127).to(torch.uint8)
    return Stored({f"{name}_blocks": packed, f"{name}_scales": exponent_bytes}, whole.to(torch.bfloat16))


def _int4(name: str, value: torch.Tensor, group: int = 32) -> Stored:
    """compressed-tensors' `pack-quantized`: 8 codes (plus 8) in each int32, lowest first, and bfloat16 scales
    per 32 columns; the shape is a tensor of its own."""
    rows, columns = value.shape
    groups = value.float().reshape(rows, columns // group, group)
    scales = (groups.abs().amax(-1) / 7).to(torch.bfloat16)
    codes = (groups / scales.float()[..., None]).round().clamp(-8, 7) + 0.0  # integers have no -0
    meaning = (codes * scales.float()[..., None]).reshape(rows, columns).to(torch.bfloat16)
    nibbles = (codes.reshape(rows, columns // 8, 8) + 8).to(torch.int64)
    packed = (nibbles << (4 * torch.arange(8))).sum(-1)
    packed = torch.where(packed >= 2**31, packed - 2**32, packed).to(torch.int32)
    stem = name.removesuffix(".weight")
    tensors = {
        f"{stem}.weight_packed": packed,
        f"{stem}.weight_scale": scales,
        f"{stem}.weight_shape": torch.tensor([rows, columns], dtype=torch.int32),
    }
    return Stored(tensors, meaning)
