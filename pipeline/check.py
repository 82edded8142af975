"""Verify a run and print what of it is whole. No torch; works while a calibration writes to it."""

from pathlib import Path

from pipeline.tables import print_rows
from stages.commands import repair_command
from state.check import Checked, check_run
from state.durable import Disk
from state.errors import DamagedStore, InputError
from state.home import expand_home


def check(run: Path) -> None:
    """Print what was verified.

    Raises:
        InputError: there is no run, or a file of it can't be read now.
        DamagedStore: something is damaged; the message names it.
    """
    run = expand_home(run)
    checked = check_run(run, Disk())
    _print(run, checked)
    if checked.damaged:
        raise DamagedStore(
            f"{run}: {len(checked.damaged)} of {checked.files} files are damaged: "
            f"{', '.join(checked.damaged)}; type: {repair_command(str(run))}",
            tuple(checked.damaged),
        )
    if checked.unreadable:
        raise InputError(
            f"{run}: {len(checked.unreadable)} files can't be read now: {', '.join(checked.unreadable)}; try "
            f"again. If they stay so, this sets them aside: {repair_command(str(run))}"
        )


def _print(run: Path, checked: Checked) -> None:
    newest = checked.newest
    commit = "no head can be read"
    if newest is not None:
        commit = f"{newest.number} ({newest.generation or 'no statistics'})"
    rows = [
        ("run", f"{run} ({'whole' if checked.whole else 'not whole'})"),
        ("commit", commit),
        ("verified", f"{checked.files:,} files"),
        *(("damaged", words) for words in checked.damaged.values()),
        *(("unreadable", words) for words in checked.unreadable.values()),
        *(("means", words) for words in checked.costs),
        *(("not ours", path) for path in checked.foreign),
    ]
    print_rows(rows)
