"""The rows each fused expert sees, taken from the matmul that consumes them.

transformers sorts the routed tokens by expert and multiplies them with all experts at once (`grouped_mm`).
While such a module runs, a torch function mode stands between it and that matmul and reads its rows and
offsets. Nothing is computed twice and transformers' own implementation stays in place, so the outputs are
bit-equal with and without observation, and a model that never reaches the matmul is noticed. The loop over
experts (`eager`) is read the same way, one linear per expert.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from state.errors import InputError

# (projection, rows, ends): rows sorted by expert, with cumulative ends
# (projection, rows, expert): the rows of one expert
GroupObserver = Callable[[str, torch.Tensor, torch.Tensor], None]
ExpertObserver = Callable[[str, torch.Tensor, int], None]

GROUPED = {"_grouped_mm", "grouped_mm", "grouped_mm_fallback"}
PROJECTIONS = ("up", "down")


class ExpertRows(TorchFunctionMode):
    """Watches the matmuls of one experts module during one forward.

    Args:
        module: the experts module. grouped, single: called with `up` or `down` (first or second projection)
        and the rows.
    """

    def __init__(self, module: nn.Module, grouped: GroupObserver, single: ExpertObserver) -> None:
        super().__init__()
        self.module, self.grouped, self.single = module, grouped, single
        self.seen: set[str] = set()

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__name__", "") in GROUPED:
            projection = PROJECTIONS[len(self.seen)]
            self.seen.add(projection)
            self.grouped(projection, args[0], kwargs["offs"] if "offs" in kwargs else args[2])
        elif func is nn.functional.linear:
            self._one_expert(args[0], args[1])
        return func(*args, **kwargs)

    def _one_expert(self, rows: torch.Tensor, weight: torch.Tensor) -> None:
        for projection, parameter in zip(PROJECTIONS, expert_parameters(self.module), strict=True):
            if weight.untyped_storage()._cdata == parameter.untyped_storage()._cdata:
                self.seen.add(projection)
                expert = (weight.storage_offset() - parameter.storage_offset()) // parameter.stride(0)
                self.single(projection, rows, expert)
                return


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
                "try ARGS='--experts eager'"
            )

    return [
        module.register_forward_pre_hook(enter),
        module.register_forward_hook(leave, always_call=True),
    ]
