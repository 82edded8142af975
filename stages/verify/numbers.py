"""What a checkpoint costs beside its source, as numbers. Means are over tokens of held-out text."""

import math
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Numbers:
    """One comparison.

    windows, tokens: of text; tokens that were predicted. loss, source_loss: nats per token. error: one
    standard error of their difference, over windows. kl: KL(source ‖ checkpoint), nats per token. agreement:
    share of tokens whose likeliest successor is the source's. layers: relative error of the hidden state
    behind each decoder layer. worst: modules whose weights are furthest from the source's, and how far.
    left_out: what was not simulated.
    """

    windows: int
    tokens: int
    loss: float
    source_loss: float
    error: float
    kl: float
    agreement: float
    layers: tuple[float, ...]
    worst: dict[str, float]
    left_out: tuple[str, ...] = ()

    @property
    def increase(self) -> float:
        """Nats per token that the checkpoint costs."""
        return self.loss - self.source_loss

    def content(self) -> dict[str, Any]:
        """For the report."""
        perplexity = {"perplexity": math.exp(self.loss), "source_perplexity": math.exp(self.source_loss)}
        return asdict(self) | {"increase": self.increase} | perplexity
