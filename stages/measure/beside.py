"""Two models of one class in step, a decoder layer of each in memory at a time: hidden states compared behind
every layer, predictions behind the last.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field

from torch import Tensor, nn

from stages.calibrate.forward.logits import LayerwiseLogits

Mode = Callable[[int, nn.Module], AbstractContextManager[object]]


@dataclass
class Predictions:
    """Sums over tokens. losses: source's and checkpoint's, f64 `[windows]` each, means of a window."""

    losses: tuple[list[Tensor], list[Tensor]] = field(default_factory=lambda: ([], []))
    distances: list[Tensor] = field(default_factory=list)
    agreeing: int = 0
    tokens: int = 0

    def add(self, source: Tensor, other: Tensor, windows: Tensor) -> None:
        """Logits `[windows, seq, vocabulary]` of both, and the tokens `[windows, seq]`."""
        after = windows[:, 1:, None]
        base, found = (logits[:, :-1].float().log_softmax(-1) for logits in (source, other))
        for losses, predicted in zip(self.losses, (base, found), strict=True):
            losses.append(-predicted.gather(-1, after).double().mean((1, 2)).cpu())
        self.distances.append((base.exp() * (base - found)).double().sum(-1).mean(1).cpu())
        self.agreeing += int((base.argmax(-1) == found.argmax(-1)).sum())
        self.tokens += after.numel()


@dataclass(frozen=True)
class Beside:
    """What a comparison in step gave. layers: ||other - source|| / ||source|| behind each."""

    layers: tuple[float, ...]
    predictions: Predictions


def compare(source: LayerwiseLogits, other: LayerwiseLogits, batches: list[Tensor], mode: Mode) -> Beside:
    """Run both. batches: tokens `[windows, seq]` of each. mode: entered around each layer of the other."""
    source.start()
    other.start()
    layers, kept = [], list[Tensor]()
    others = list[Tensor]()

    def watch_source(_layer: int, module: nn.Module) -> AbstractContextManager[object]:
        kept.clear()
        return outputs_of(module, kept)

    @contextmanager
    def watch_other(layer: int, module: nn.Module) -> Iterator[None]:
        others.clear()
        with outputs_of(module, others), mode(layer, module):
            yield

    for _ in zip(source.steps(watch_source), other.steps(watch_other), strict=True):
        layers.append(_relative(others, kept))
    predictions = Predictions()
    for number, tokens in enumerate(batches):
        base, found = source.logits(number, kept[number]), other.logits(number, others[number])
        predictions.add(base, found, tokens)
    return Beside(tuple(layers), predictions)


@contextmanager
def outputs_of(module: nn.Module, into: list[Tensor]) -> Iterator[None]:
    """Keep the hidden state that a layer hands on, of every call within."""

    def keep(_module: nn.Module, _args: object, output: object) -> None:
        hidden = output[0] if isinstance(output, tuple) else output
        assert isinstance(hidden, Tensor)
        into.append(hidden.clone())

    hook = module.register_forward_hook(keep)
    try:
        yield
    finally:
        hook.remove()


def _relative(others: list[Tensor], kept: list[Tensor]) -> float:
    difference = total = 0.0
    for mine, its in zip(others, kept, strict=True):
        difference += float((mine.double() - its.double()).square().sum())
        total += float(its.double().square().sum())
    return (difference / total) ** 0.5 if total else 0.0
