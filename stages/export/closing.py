"""A last look at what was written, by the rules of engines, before it becomes OUT.

Headers, configurations and scales of one value, in seconds: weights were checked as they were packed, and
`verify` reads all of it.
"""

from collections.abc import Collection, Iterator
from pathlib import Path

from stages.engines.files import read_files
from stages.engines.findings import Finding
from stages.engines.layout import layout_findings
from stages.engines.modules import take_stock
from stages.engines.scalars import scalar_findings
from state.errors import InputError

OURS = frozenset(
    {"files", "config", "config-disagree", "group-size", "dtype", "shape", "scale-value", "fused-scales"}
)
"""Rules that only an export itself can break; a source may break others, such as by a scale that it holds."""


def require_readable(folder: Path, weights_only: Collection[str]) -> list[Finding]:
    """What is strange about a checkpoint in a folder, that its source may have brought.

    Args:
        weights_only: modules that a policy left without an input scale.
    Raises InputError for what the source can't have brought: it must not be published.
    """
    found = list(_findings(folder, weights_only))
    wrong = [finding for finding in found if finding.rule in OURS]
    if wrong:
        raise InputError(
            f"{folder} is not what engines read, and was not published: {wrong[0]} ({len(wrong)} such). "
            "This is a fault of Holdfast; please report it"
        )
    return found


def _findings(folder: Path, weights_only: Collection[str]) -> Iterator[Finding]:
    files = read_files(folder)
    if files.stated is None:  # a recipe that quantizes nothing
        yield from (finding for finding in files.findings if finding.rule != "config")
        return
    yield from files.findings
    if files.source is None:
        return
    source, inventory = files.source, take_stock(files.source.tensors, files.stated)
    left_out = {f"{module}.input_scale" for module in weights_only}
    for finding in layout_findings(source.tensors, files.stated, inventory, files.layers):
        if finding.name not in left_out:
            yield finding
    yield from scalar_findings(source, inventory)
