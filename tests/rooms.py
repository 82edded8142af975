"""The rooms of Holdfast, floor by floor, and what may import what."""

from collections.abc import Mapping

from tests.imports import Graph, between, import_graph

FLOORS: tuple[tuple[str, ...], ...] = (
    ("holdfast",),
    ("pipeline",),
    ("stages.capture", "stages.measure", "stages.quantize"),
    ("stages.calibrate", "stages.export", "stages.verify"),
    ("stages.recipe", "stages.solve", "stages.engines"),
    ("stages.model", "stages.fold", "stages.formats", "stages.kernels", "stages.unify"),
    ("stages.commands",),
    ("stages.settings", "stages.progress"),
    ("state",),
)
"""From the top down: a room imports from lower floors, and never back."""

STRANGERS = frozenset(FLOORS[3])
"""Rooms that never import each other. Elsewhere on a floor arrows may go one way, but never in a circle."""

CAPTURE_KNOWS_NOT = frozenset({"stages.export", "stages.verify"})
"""Capture lies beside the stages and stands in for calibration; of the others it uses nothing."""

FLOOR_OF = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}


def room_of(module: str) -> str:
    """The room that a module lies in; one that the table doesn't know is an error.

    The package `stages` itself holds nothing to import; it counts as the room below all others of it.
    """
    if module == "stages":
        return "stages.settings"
    unknown = module
    while module not in FLOOR_OF:
        module = module.rpartition(".")[0]
        if not module:
            raise ValueError(f"{unknown} is not in any room of the table")
    return module


def forbidden(sources: Mapping[str, str]) -> list[str]:
    """Every import between rooms that no rule allows, as `importer -> imported`, sorted."""
    graph = import_graph(sources)
    return sorted(
        f"{module} -> {other}"
        for module, others in graph.items()
        for other in others
        if not _may(room_of(module), room_of(other))
    )


def room_graph(sources: Mapping[str, str]) -> Graph:
    """Room → the rooms that it imports from."""
    return between(import_graph(sources), {module: room_of(module) for module in sources})


def _may(importer: str, other: str) -> bool:
    if importer == other:
        return True
    if importer == "stages.capture" and other in CAPTURE_KNOWS_NOT:
        return False
    if {importer, other} <= STRANGERS:
        return False
    return FLOOR_OF[importer] <= FLOOR_OF[other]
