"""Scales of NVFP4 blocks by least squared error, from the weights alone.

`sweep` finds the best of all 126 scales that e4m3 holds (modelopt's `mse` with `fp8_scale_sweep`);
`four_over_six` puts the largest weight of each block on 6 or on 4, where the grid is less coarse (arXiv
2512.02010). Errors are those of modelopt's fake quantization, operation by operation, so that the same one of
two scales wins that are equal but for rounding (`compute_fp4_scales`, `_fp8_eager`, `MseCalibrator`).

A sweep need not try all scales. Going down, the largest weight is clipped further and further, and once that
alone costs more than the best scale so far, smaller ones can't be better. Going up, a scale under which the
largest weight becomes no more than 3 is no better than half of it, whose grid has all its values; half an
odd code of e4m3's smallest is not a code.
"""

from collections.abc import Callable
from itertools import count

import torch
from torch import Tensor

from stages.formats.grids import E2M1_MAX, E4M3_MAX, round_e2m1
from stages.formats.packing import spans

SMALLEST, LARGEST = 1, 126
"""The codes of 2^-9 and 448, e4m3's ends. Neighbouring values are neighbouring codes."""
EVENLY_SPACED = 16
"""Codes up to this one are multiples of the smallest value."""
ROUNDS_TO_4 = 3.49
"""In steps of the grid, and a little less: from 3.5 on."""
E4M3_MIN = 2.0**-9
SPARE_BITS = 12
"""Of a float32, which numbers of bf16 and f16 leave zero; one less than there are."""
FOUR_OVER_SIX_MAX = 256.0
"""The largest weight's block scale on 6: one that half as much again still is in e4m3."""

Search = Callable[[Tensor, Tensor], Tensor]


def sweep(weight: Tensor, amax: Tensor, tensor_scale: Tensor) -> Tensor:
    """The best scale of each block, the smallest of equal ones: float8_e4m3fn, of amax' shape.

    Args:
        weight: `[N, K]` in bf16, f16 or f32. amax: of its blocks, f32 `[N, K / block]`.
        tensor_scale: f32 `[]`.
    """

    _, unit = _units(_amax_of(tensor_scale))

    def search(blocks: Tensor, amax: Tensor) -> Tensor:
        best = _nearest(amax / (E2M1_MAX * tensor_scale)).view(torch.uint8).int()
        best.masked_fill_(amax == 0, SMALLEST)
        begin, least = best.clone(), _errors(blocks, _steps(best, unit))
        for direction in (-1, 1):
            for offset in count(1):
                codes = begin + direction * offset
                steps = _steps(codes.clamp(SMALLEST, LARGEST), unit)
                hopeful = (codes >= SMALLEST) & (codes <= LARGEST)
                if direction < 0:
                    hopeful &= (amax - E2M1_MAX * steps).clamp_(min=0).square_() <= least
                else:
                    odd = (codes < EVENLY_SPACED) & (codes % 2 == 1)
                    hopeful &= (amax >= ROUNDS_TO_4 * steps) | odd
                places = hopeful.nonzero().flatten()
                if not len(places):
                    break
                errors = _errors(blocks[places], steps[places])
                better = errors <= least[places] if direction < 0 else errors < least[places]
                places = places[better]
                best[places], least[places] = codes[places], errors[better]
        return best.to(torch.uint8)

    return _in_pieces(weight, amax, search)


def four_over_six(weight: Tensor, amax: Tensor, tensor_scale: Tensor) -> Tensor:
    """Each block's scale from its amax, or from 1.5 times that where the error is less; as `sweep`.

    The scale that is stored is that of modelopt's exporter, which rounds otherwise than its fake
    quantization: at ties of e4m3 the two differ by a code.
    """
    largest = tensor_scale * (E2M1_MAX * FOUR_OVER_SIX_MAX)  # exact: (x / m) * m is x for m = 2^10 + 2^9
    units, unit = _units(largest * (E4M3_MAX / FOUR_OVER_SIX_MAX))

    def error(blocks: Tensor, amax: Tensor) -> Tensor:
        rounded = (amax / E2M1_MAX * units).clamp_(max=E4M3_MAX).to(torch.float8_e4m3fn).float()
        return _errors(blocks, (rounded * unit).clamp_(min=torch.finfo(torch.float32).tiny))

    def search(blocks: Tensor, amax: Tensor) -> Tensor:
        best = torch.where(error(blocks, amax * 1.5) < error(blocks, amax), amax * 1.5, amax)
        scale = best / E2M1_MAX
        scale.masked_fill_(scale == 0, 1.0)
        return _nearest(scale * FOUR_OVER_SIX_MAX / (largest / E2M1_MAX)).view(torch.uint8)

    return _in_pieces(weight, amax, search)


def _nearest(scale: Tensor) -> Tensor:
    return scale.clamp(E4M3_MIN, E4M3_MAX).to(torch.float8_e4m3fn)


def _amax_of(tensor_scale: Tensor) -> Tensor:
    """The amax that a tensor scale of amax / 2688 comes from. It is a number of bf16 or f16, with few bits,
    unless the weights are in f32; then the last bit may be another.
    """
    amax = (tensor_scale.double() * (E2M1_MAX * E4M3_MAX)).float()
    short = (amax.view(torch.int32) + (1 << SPARE_BITS >> 1) >> SPARE_BITS << SPARE_BITS).view(torch.float32)
    return torch.where(short / (E2M1_MAX * E4M3_MAX) == tensor_scale, short, amax)


def _units(amax: Tensor) -> tuple[Tensor, Tensor]:
    """How many units of a block scale are 1, and what one is worth, for a largest weight: f32 `[]`."""
    units = E4M3_MAX / (amax / E2M1_MAX)
    return units, 1 / units


def _steps(codes: Tensor, unit: Tensor) -> Tensor:
    return codes.to(torch.uint8).view(torch.float8_e4m3fn).float() * unit


def _errors(blocks: Tensor, steps: Tensor) -> Tensor:
    """The squared error of each block: f32 `[blocks, block]`, `[blocks]` → `[blocks]`."""
    steps = steps[:, None]
    return round_e2m1(blocks / steps).mul_(steps).sub_(blocks).square_().sum(-1)


def _in_pieces(weight: Tensor, amax: Tensor, search: Search) -> Tensor:
    flat = amax.reshape(-1)
    blocks = weight.contiguous().view(len(flat), -1)
    found = torch.empty(len(blocks), dtype=torch.uint8, device=weight.device)
    for part in spans(len(blocks), blocks.shape[1], weight.device):
        found[part] = search(blocks[part].float(), flat[part])
    return found.view(torch.float8_e4m3fn).view(amax.shape)
