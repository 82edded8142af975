"""Which way each weight is rounded, found by gradient steps: the maths of the solver `tune`. Pure.

W = round(U) * step, where U is the latent weight in units of its step. GPTQ's compensated columns are the
first U; steps by the sign of a running mean of the gradient move it, and about a tenth of the codes end
elsewhere. Scales stay as GPTQ chose them. (SignSGD on rounding as in AutoRound, arXiv 2309.05516; the start,
the momentum and the weights of tokens are this project's own.)
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from stages.formats import WeightFormat
from stages.formats.quantized import Quantized

STEPS = 100
WINDOWS = 8
"""Of one step."""
RATE = 0.005
"""Of the first step, in units of the grid. It falls linearly to 0: all steps together move a latent by a
quarter at most.
"""
MOMENTUM = 0.9
SEED = 0

FLOOR = 1e-4
TINY = 1e-30
HEADROOM = 4
"""Powers of two between a token's gradient and 1, for the sum over tokens."""

FIXED: dict[str, float] = {
    "steps": STEPS,
    "windows": WINDOWS,
    "rate": RATE,
    "momentum": MOMENTUM,
    "seed": SEED,
}
"""What a result depends on besides its inputs."""


@dataclass
class Latent:
    """A matrix whose rounding is being tuned, under scales that stay.

    values: U, f32 `[E, N, K]`. momentum: the running mean of its gradient, likewise. format, scale,
    tensor_scale: as in `Quantized`.
    """

    format: WeightFormat
    scale: Tensor
    tensor_scale: Tensor | None
    values: Tensor
    momentum: Tensor

    @classmethod
    def of(cls, quantized: Quantized, latents: Tensor) -> "Latent":
        """With the latents that `gptq.solve_latent` gives, in memory of its own."""
        values = latents.clone(memory_format=torch.contiguous_format)
        scales = quantized.scale.clone(), quantized.tensor_scale
        return cls(quantized.format, *scales, values, torch.zeros_like(values))

    def rounded(self) -> Quantized:
        """The nearest values on the grid."""
        return Quantized(self.format, self.format.round(self.values), self.scale, self.tensor_scale)

    def weights(self, dtype: torch.dtype) -> Tensor:
        """What the layer multiplies with under them: `[E, N, K]`."""
        if self.values.is_cuda:
            made = self.format.weights_on_gpu(self.values, self.scale, self.tensor_scale, dtype)
            if made is not None:
                return made
        return self.rounded().dequantize().to(dtype)

    def move(self, gradient: Tensor, rate: float) -> None:
        """One step against the gradient of the loss with respect to W, `[E, N, K]` in any dtype.

        The gradient passes the rounding as if it were not there. A latent's own gradient is this times its
        step, which is above 0 and the same throughout: the sign of the mean does not need it. Where no token
        reached an expert, gradient and mean are 0, and nothing moves.
        """
        if self.values.is_cuda:
            from stages.kernels.tuned_rounding import sign_step

            sign_step(self.values, self.momentum, gradient, 1 - MOMENTUM, rate)
            return
        self.momentum.lerp_(gradient.to(self.momentum.dtype), 1 - MOMENTUM)
        self.values.sub_(self.momentum.sign(), alpha=rate)


def rate_of(number: int) -> float:
    """The rate of a step, counted from 0."""
    return RATE * (1 - number / STEPS)


def orders(batches: int, together: int, layer: int) -> list[list[int]]:
    """The batches of every step: all in random order, again and again; those that don't fill a step wait for
    another round.

    Args:
        together: batches of one step. layer: number of the layer; each has an order of its own.
    """
    random = torch.Generator().manual_seed(SEED + layer)
    found: list[list[int]] = []
    while len(found) < STEPS:
        order = torch.randperm(batches, generator=random).tolist()
        found += [order[start : start + together] for start in range(0, batches - together + 1, together)]
    return found[:STEPS]


def token_weights(target: Tensor) -> Tensor:
    """1 / mean(y²) of each token, so that all count alike: f32 `[...]` for `[..., channels]`. A token that is
    all but nothing beside the others counts as if it were FLOOR of their median.
    """
    power = target.float().pow(2).mean(-1)
    return 1 / power.clamp(min=float((power.median() * FLOOR).clamp(min=TINY)))


def loss_scale(target: Tensor) -> float:
    """A power of two that the loss is multiplied by, so that gradients of a half-precision output, which are
    about 1 / (channels * |y|), neither vanish nor overflow. It changes no sign.
    """
    power = float(target.float().pow(2).mean(-1).median().clamp(min=TINY))
    return 2.0 ** round(math.log2(target.shape[-1] * math.sqrt(power)) - HEADROOM)


def token_errors(output: Tensor, target: Tensor) -> Tensor:
    """Mean squared error of each token: f32 `[...]` for `[..., channels]`."""
    return (output.float() - target.float()).pow(2).mean(-1)


def against_noise(errors: Tensor) -> Tensor:
    """1 / (1 + e / median e): tokens that no rounding can make right any more count less. f32, of e's shape.

    Args:
        errors: e ≥ 0, weighted, of all tokens.
    """
    median = errors.median()
    return torch.where(median > 0, 1 / (1 + errors / median), 1.0)
