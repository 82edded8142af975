"""What an export would write and need, without writing it."""

from dataclasses import replace
from pathlib import Path

from stages.export.place import find_place
from stages.export.plan import ExportPlan
from stages.export.reading import largest_piece
from stages.export.report import ExportReport, Needs
from stages.export.standing import Wanted, examine
from stages.export.tensors import cut_of, rows_together, sources
from state.durable import Disk

COPIES = 6
"""Of a piece, while it is packed: as floats of 32 bits, scaled, and in thirds of the codes."""


def forecast(
    plan: ExportPlan, wanted: Wanted, out: Path, overwrite: bool, ahead: int, workers: int
) -> ExportReport:
    """The report of an export to OUT that is not made, with what it needs. Nothing is changed.

    Args:
        ahead: bytes that are on the way at most, besides what `workers` threads pack.

    Raises:
        InputError, IdentityMismatch, DamagedStore: as `open_folder` would, for what is at OUT itself.
    """
    disk, place = Disk(), find_place(out)
    standing = examine(disk, place.out, wanted, overwrite)
    small = sum(len(data) for data in plan.files.values())
    memory = ahead + (1 + COPIES * workers) * _largest_piece(plan)
    needs = Needs(plan.report.nbytes + small, disk.free_bytes(place.out), memory)
    return replace(plan.report, needs=needs, already_finished=standing.journal is not None)


def _largest_piece(plan: ExportPlan) -> int:
    given, largest = plan.ingredients, 0
    for shard in plan.shards:
        for name, units in sources(shard).items():
            cut = cut_of(name, units, given.rescaling)
            largest = max(largest, largest_piece(given.source.tensors[name], cut, rows_together(units)))
    return largest
