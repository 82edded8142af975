"""Which module imports which, read from the sources: what the rules between rooms are checked against."""

import ast
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

Graph = dict[str, set[str]]


def read_sources(root: Path, packages: Iterable[str]) -> dict[str, str]:
    """Dotted name of each module below `packages` → its source. A package goes by its own name."""
    files = [path for package in packages for path in sorted((root / package).rglob("*.py"))]
    return {module_name(path.relative_to(root)): path.read_text(encoding="utf-8") for path in files}


def module_name(path: Path) -> str:
    """`stages/export/run.py` → `stages.export.run`; `stages/export/__init__.py` → `stages.export`."""
    parts = path.with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported(source: str) -> Iterator[str]:
    """Every module or name that a source imports, at its top, within functions or for type checkers alone.

    `from a.b import c` gives `a.b.c`, since `c` may be a module.
    """
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            if node.level:
                raise ValueError(f"line {node.lineno}: relative import")
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def import_graph(sources: Mapping[str, str]) -> Graph:
    """Module → the other modules of `sources` that it imports; of a name within a module, that module."""
    graph: Graph = {}
    for module, source in sources.items():
        found = (_nearest(name, sources) for name in imported(source))
        graph[module] = {other for other in found if other is not None and other != module}
    return graph


def _nearest(name: str, sources: Mapping[str, str]) -> str | None:
    while name and name not in sources:
        name = name.rpartition(".")[0]
    return name or None


def between(graph: Mapping[str, set[str]], room_of: Mapping[str, str]) -> Graph:
    """The graph of modules as a graph of their rooms."""
    rooms: Graph = {room: set() for room in room_of.values()}
    for module, others in graph.items():
        rooms[room_of[module]] |= {room_of[other] for other in others} - {room_of[module]}
    return rooms


def find_circle(graph: Mapping[str, set[str]]) -> list[str]:
    """A circle of imports, its first member repeated at the end; empty where there is none."""
    done: set[str] = set()
    for start in sorted(graph):
        if circle := _circle_from(start, graph, [], done):
            return circle
    return []


def _circle_from(module: str, graph: Mapping[str, set[str]], path: list[str], done: set[str]) -> list[str]:
    if module in path:
        return [*path[path.index(module) :], module]
    if module in done:
        return []
    for other in sorted(graph.get(module, ())):
        if circle := _circle_from(other, graph, [*path, module], done):
            return circle
    done.add(module)
    return []
