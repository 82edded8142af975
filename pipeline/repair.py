"""Repair a run and print what was done, and what is to be made again. No torch."""

from pathlib import Path

from pipeline.tables import print_rows
from stages.commands import calibrate_command, check_command, export_command
from state.errors import DamagedStore
from state.home import expand_home
from state.repair import repair_run


def repair(run: Path) -> None:
    """Print what was found and done.

    Raises:
        InputError: there is no run, or another process writes to it.
        DamagedStore: nothing can be proved whole, or something is left that only calibrating makes again.
    """
    run = expand_home(run)
    with repair_run(run) as writer:
        head, settings, notes, missing = writer.head, writer.record.settings, writer.notes, writer.missing
    calibrate = calibrate_command({**settings, "run": str(run)})
    lost = any("is lost" in note for note in notes)
    recipe = str(settings.get("recipe", ""))
    done = head.finished and not lost
    rows = [
        ("run", f"{run} ({'finished' if head.finished else 'unfinished'})"),
        ("commit", f"{head.number} ({head.generation or 'no statistics'})"),
        *(("found", note) for note in notes),
        ("next", export_command(str(run), recipe, recipe) if done else calibrate),
    ]
    print_rows(rows if notes else [*rows[:2], ("found", "all is whole; nothing was changed"), *rows[-1:]])
    if missing:
        raise DamagedStore(
            f"{run}: {', '.join(missing)} stays damaged. Statistics can be exported; this writes it again "
            f"from the same data: {calibrate}. {check_command(str(run))} names what is left.",
            missing,
        )
