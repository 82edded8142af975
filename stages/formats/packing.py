"""How a weight becomes the bytes a checkpoint holds, a piece at a time: quotient, rounding, codes.

The arithmetic is modelopt's, value by value, and the bytes are the same; only the way there is another. A
piece stays in the processor's cache from its reading to its codes, and nothing is done but what a CPU does
many values at a time. A GPU gives a CPU's bytes as long as it divides by tensors: by a number it multiplies
with the reciprocal.
"""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

AT_ONCE = 1 << 18
"""Values that each thread of a CPU works on at a time; their floats fit into its cache."""
ON_GPU = 1 << 26
"""Values that a GPU works on at a time."""

BITS = {2: torch.int16, 4: torch.int32}
SIGN = 8
"""e2m1's fourth bit."""


def spans(total: int, unit: int, device: torch.device) -> Iterator[slice]:
    """Cut `total` units of `unit` values each into pieces of a good size."""
    values = ON_GPU if device.type == "cuda" else AT_ONCE * torch.get_num_threads()
    step = max(1, values // unit)
    for first in range(0, total, step):
        yield slice(first, min(first + step, total))


def by_rows(
    weight: Tensor, packed: Tensor, encode: Callable[[Tensor, slice], Tensor], together: int = 1
) -> Tensor:
    """Fill `packed` `[N / together, ...]` from a weight `[N, K]`, some rows at a time; returns it.

    Args:
        encode: rows of the weight, and which they are → what is packed of them.
        together: rows that share a row of `packed`; N is a multiple.
    """
    for part in spans(packed.shape[0], weight.shape[1] * together, weight.device):
        rows = slice(part.start * together, part.stop * together)
        packed[part] = encode(weight[rows], rows)
    return packed


def block_amax(weight: Tensor, block: int) -> Tensor:
    """The amax of each block of a row: `[N, K]` in bf16, f16 or f32 → f32 `[N, K / block]`.

    A float's magnitude grows with its bits, and integers are compared much faster.
    """
    rows, columns = weight.shape
    blocks = weight.contiguous().view(-1, block)
    largest = torch.empty(len(blocks), dtype=weight.dtype, device=weight.device)
    bits = BITS[weight.element_size()]
    for part in spans(len(blocks), block, weight.device):
        magnitudes = blocks[part].view(bits) & torch.iinfo(bits).max
        torch.amax(magnitudes, -1, out=largest[part].view(bits))
    return largest.view(rows, columns // block).float()


def e2m1_codes(quotients: Tensor, code: Tensor, term: Tensor) -> Tensor:
    """The code of each quotient, int8 `[..., n]`; overwrites all three, of one shape.

    Ties go to the even code, -0 to +0. Up to 2 the code counts halves, up to 4 ones, up to 6 twos. Each of
    the three is rounded for itself: a sum of unrounded parts would lose the last bits, and with them who is a
    tie.
    """
    negative = torch.sign(quotients, out=term).to(torch.int8).bitwise_and_(SIGN)
    quotients.abs_()
    torch.mul(quotients, 0.5, out=code).round_().clamp_(2, 3)
    code += torch.round(quotients, out=term).clamp_(2, 4)
    code += quotients.mul_(2).round_().clamp_(max=4)
    return code.sub_(4).to(torch.int8).bitwise_or_(negative)


def e2m1_codes_down(quotients: Tensor, code: Tensor, term: Tensor) -> Tensor:
    """As `e2m1_codes`, but ties go to the smaller code, and zero to -0: modelopt's MXFP4."""
    negative = (quotients <= 0).to(torch.int8).mul_(SIGN)
    quotients.abs_()
    torch.mul(quotients, 0.5, out=code).sub_(0.5).ceil_().clamp_(2, 3)
    code += torch.sub(quotients, 0.5, out=term).ceil_().clamp_(2, 4)
    code += quotients.mul_(2).sub_(0.5).ceil_().clamp_(max=4)
    return code.sub_(4).to(torch.int8).bitwise_or_(negative)


Codes = Callable[[Tensor, Tensor, Tensor], Tensor]


def pack_e2m1(weight: Tensor, steps: Tensor, codes: Codes = e2m1_codes) -> Tensor:
    """Codes of e2m1, two a byte, the even column low: `[..., K]` → uint8 `[..., K / 2]`.

    Args:
        steps: what one unit of the grid is worth in each block of a row, f32 `[..., blocks]`.
        codes: rounds quotients, float32, and may overwrite them and two more tensors of their shape.
    What lies beyond the grid goes to its end. What is no number, 0 / 0, gets the largest code, as modelopt
    has it.
    """
    columns = weight.shape[-1]
    block = columns // steps.shape[-1]
    blocks, steps = weight.contiguous().view(-1, block), steps.reshape(-1, 1)
    packed = torch.empty(len(blocks), block // 2, dtype=torch.uint8, device=weight.device)
    undefined = not bool((steps > 0).all())
    room: list[Tensor] = []
    for part in spans(len(blocks), block, weight.device):
        if not room:  # of the first piece, which is the largest: new memory for each would cost a third more
            room = [torch.empty(blocks[part].shape, device=weight.device) for _ in range(3)]
        quotients, code, term = (floats[: part.stop - part.start] for floats in room)
        quotients.copy_(blocks[part]).div_(steps[part])
        if undefined:
            quotients.nan_to_num_(nan=torch.inf)
        packed[part] = _in_pairs(codes(quotients, code, term))
    return packed.view(*weight.shape[:-1], columns // 2)


def _in_pairs(codes: Tensor) -> Tensor:
    """Two codes below 16 in a byte, the even one low: int8 `[..., n]` → uint8 `[..., n / 2]`."""
    pairs = codes.view(torch.int16)
    return (pairs | (pairs >> 4)).to(torch.uint8)
