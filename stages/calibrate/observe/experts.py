"""The rows each fused expert sees, taken from the matmul that consumes them.

transformers sorts the routed tokens by expert and multiplies them with all experts at once (`grouped_mm`).
While such a module runs, the functions it may multiply with are replaced by ones that read their rows and
offsets first. Nothing is computed twice and transformers' own implementation stays in place, so the outputs
are bit-equal with and without observation, and a model that never reaches the matmul is noticed. The loop
over experts (`eager`) is read the same way, one product per expert; and so is Llama 4, which hands every
token to every expert: those that were not routed there are zeros, and do not count. (A torch function mode
would do as well, but slows every other call of the module too: 0.1 ms a forward instead of 0.01.)
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from state.errors import InputError

# (projection, rows, ends): rows sorted by expert, with cumulative ends
# (projection, rows, expert): the rows of one expert
# Either may return rows that are multiplied instead.
GroupObserver = Callable[[str, torch.Tensor, torch.Tensor], torch.Tensor | None]
ExpertObserver = Callable[[str, torch.Tensor, int], torch.Tensor | None]
Matmul = Callable[..., torch.Tensor]

GROUPED = ("grouped_mm", "_grouped_mm", "grouped_mm_fallback")
MATMULS = (
    (nn.functional, "linear"),
    (torch.Tensor, "__matmul__"),
    (torch, "bmm"),
    (nn.functional, "grouped_mm"),
    (torch, "_grouped_mm"),
    (torch.ops.transformers, "grouped_mm_fallback"),  # where a GPU is too old for the others
)
PROJECTIONS = ("up", "down")


class ExpertRows:
    """Watches the matmuls of one experts module during one forward, within a `with`.

    Args:
        module: the experts module. grouped, single: called with `up` or `down` (first or second projection)
        and the rows.
    """

    def __init__(self, module: nn.Module, grouped: GroupObserver, single: ExpertObserver) -> None:
        self.module, self.grouped, self.single = module, grouped, single
        self.seen: set[str] = set()
        self._reached: torch.Tensor | None = None
        self._replaced: list[tuple[Any, str, Matmul | None]] = []
        self._multiplying = False

    def __enter__(self) -> "ExpertRows":
        for holder, name in MATMULS:
            if hasattr(holder, name):
                original = getattr(holder, name)
                inherited = name not in vars(holder)
                self._replaced.append((holder, name, None if inherited else original))
                setattr(holder, name, self._watched(original, name))
        return self

    def __exit__(self, *_exception: object) -> None:
        while self._replaced:
            holder, name, original = self._replaced.pop()
            if original is None:
                delattr(holder, name)
            else:
                setattr(holder, name, original)

    def _watched(self, matmul: Matmul, name: str) -> Matmul:
        def watched(*args: Any, **kwargs: Any) -> torch.Tensor:
            if self._multiplying:  # one of them calls another
                return matmul(*args, **kwargs)
            if name in GROUPED:
                projection = PROJECTIONS[len(self.seen)]
                self.seen.add(projection)
                rows = self.grouped(projection, args[0], kwargs["offs"] if "offs" in kwargs else args[2])
            elif name == "bmm":
                rows = self._all_experts(args[0], args[1])
            else:
                rows = self._one_expert(args[0], args[1])
            if rows is not None:
                args = (rows, *args[1:])
            self._multiplying = True
            try:
                return matmul(*args, **kwargs)
            finally:
                self._multiplying = False

        return watched

    def _one_expert(self, rows: torch.Tensor, weight: torch.Tensor) -> torch.Tensor | None:
        projection, parameter = self._projection(weight)
        if projection is None:
            return None
        self.seen.add(projection)
        expert = (weight.storage_offset() - parameter.storage_offset()) // parameter.stride(0)
        return self.single(projection, rows, expert)

    def _all_experts(self, rows: torch.Tensor, weights: torch.Tensor) -> torch.Tensor | None:
        """rows: `[experts, tokens, channels]`, zeros where a token is not the expert's."""
        projection, _ = self._projection(weights)
        if projection is None:
            return None
        self.seen.add(projection)
        if projection == "up":
            self._reached = rows.ne(0).any(-1)
        assert self._reached is not None  # up comes first
        ends = self._reached.sum(1).cumsum(0).to(torch.int32)
        instead = self.grouped(projection, rows[self._reached], ends)
        return None if instead is None else rows.masked_scatter(self._reached[..., None], instead)

    def _projection(self, weight: torch.Tensor) -> tuple[str | None, torch.Tensor]:
        """The projection that a weight is of, and its parameter."""
        for projection, parameter in zip(PROJECTIONS, expert_parameters(self.module), strict=True):
            if weight.untyped_storage()._cdata == parameter.untyped_storage()._cdata:
                return projection, parameter
        return None, weight


def expert_parameters(module: nn.Module) -> tuple[torch.Tensor, torch.Tensor]:
    """First and second projection of all experts, three-dimensional."""
    first = module.gate_up_proj if hasattr(module, "gate_up_proj") else module.up_proj
    return first, module.down_proj  # type: ignore[return-value]


def watch_experts(
    name: str, module: nn.Module, grouped: GroupObserver, single: ExpertObserver
) -> list[torch.utils.hooks.RemovableHandle]:
    """Observe every forward of an experts module; returns the hooks to remove.

    Raises InputError (from the forward) when a forward reaches neither matmul: what can't be observed must
    not pass for observed.
    """
    running: list[ExpertRows] = []

    def enter(_module: nn.Module, _args: Any) -> None:
        rows = ExpertRows(module, grouped, single)
        rows.__enter__()
        running.append(rows)

    def leave(_module: nn.Module, args: Any, _output: Any) -> None:
        rows = running.pop()
        rows.__exit__(None, None, None)
        if not rows.seen and args[0].numel():
            raise InputError(
                f"{name} ({type(module).__name__}) multiplied its experts in a way that can't be observed; "
                "try --experts eager"
            )

    return [
        module.register_forward_pre_hook(enter),
        # Of several who watch, the one that came last leaves first.
        module.register_forward_hook(leave, prepend=True, always_call=True),
    ]
