"""The short tables at the end of a command."""

from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.progress import duration, quantity
from pipeline.tables import coverage_rows, print_rows
from stages.calibrate.summary import Summary
from stages.commands import export_command
from stages.export.records import REPORT
from stages.export.report import ExportReport, Needs
from stages.export.target import told
from stages.settings import QuantizeSettings

if TYPE_CHECKING:  # torch comes with it
    from stages.quantize import Quantized


def print_calibration(summary: Summary) -> None:
    """What was measured, what the text did not reach, where it is, what to type next."""
    following = export_command(str(summary.run), summary.recipe, summary.remembered)
    print_rows([*_calibration_rows(summary), ("next", following)])


def print_quantized(done: "Quantized", settings: QuantizeSettings) -> None:
    """Both tables, as one."""
    if done.calibration is not None:
        print_rows(_calibration_rows(done.calibration))
    print_export(done.export, settings.out)


def _calibration_rows(summary: Summary) -> list[tuple[str, str]]:
    rows = [
        ("run", f"{summary.run}{' (was finished before)' if summary.already_finished else ''}"),
        *coverage_rows(summary.coverage),
    ]
    if not summary.already_finished:
        rows.append(("took", f"{duration(summary.seconds)} for {summary.tokens:,} tokens"))
    return rows


def print_export(report: ExportReport, out: Path) -> None:
    """What was written and which policies acted; of an export that was only asked about, what would be."""
    if report.needs is not None:
        _print_forecast(report, report.needs, out)
        return
    rows = [
        ("checkpoint", f"{out}{' (was finished before)' if report.already_finished else ''}"),
        ("recipe", report.recipe),
        *((f"stored as {name}", f"{count:,}") for name, count in report.formats.items()),
        ("size", f"{quantity(report.nbytes, 'bytes')} of {quantity(report.source_nbytes, 'bytes')} before"),
        ("shards", f"{report.shards_written} written, {report.shards_kept} kept"),
        ("loaded by", told(report.engines)),
    ]
    if report.partial:
        rows.append(("partial", "the run is unfinished"))
    if acted := report.policy_counts():
        rows.append(("policies", f"{', '.join(acted)}: see {out / REPORT}"))
    rows.append(("took", duration(report.seconds)))
    print_rows(rows)


def _print_forecast(report: ExportReport, needs: Needs, out: Path) -> None:
    standing = " (is finished: nothing would be written)" if report.already_finished else ""
    rows = [
        ("would write", f"{out}{standing}"),
        ("recipe", report.recipe),
        *((f"stored as {name}", f"{count:,}") for name, count in report.formats.items()),
        ("size", f"{quantity(report.nbytes, 'bytes')} of {quantity(report.source_nbytes, 'bytes')} before"),
        *((name, quantity(nbytes, "bytes")) for name, nbytes in report.shards.items()),
        ("loaded by", told(report.engines)),
        *((f"policy {policy}", f"{count:,} quantizers") for policy, count in report.policy_counts().items()),
        ("disk", f"{quantity(needs.disk, 'bytes')} needed, {quantity(needs.free, 'bytes')} free"),
        ("memory", f"{quantity(needs.memory, 'bytes')} above the imports"),
    ]
    print_rows(rows)
