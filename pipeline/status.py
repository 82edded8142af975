"""How far a run is, read without a lock and without torch, also while a calibration writes to it."""

import json
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

from pipeline.progress import duration
from pipeline.tables import coverage_rows, print_rows
from stages.calibrate.summary import Coverage, measure_coverage
from stages.commands import calibrate_command, export_command
from state.errors import InputError, Unreadable
from state.home import expand_home
from state.objects import solutions
from state.reader import Calibration, open_run

ATTEMPTS = 5


@dataclass(frozen=True)
class Status:
    """A run in numbers, at its newest commit.

    batches, tokens: done and in all, of the whole-model schedule. layers: done and in all, of an unfinished
    layerwise one. solutions: solver → layers solved and in all. commit_age: seconds since the newest commit,
    None if unknown. last_event: what the log ends with ("committed", "stopped", ...). notes: damage that was
    passed over.
    """

    run: str
    model: str
    finished: bool
    commit: int
    generation: str | None
    batches: tuple[int, int]
    tokens: tuple[int, int]
    layers: tuple[int, int] | None
    solutions: dict[str, tuple[int, int]]
    commit_age: float | None
    last_event: str | None
    coverage: Coverage
    notes: tuple[str, ...]
    next_command: str


def look(run: Path) -> Status:
    """Read a run.

    Raises:
        InputError: there is no run. DamagedStore: no commit of it is whole.
    """
    run = expand_home(run)
    for attempt in range(ATTEMPTS):
        try:
            return _read(open_run(run, verify=False))
        except Unreadable:
            raise
        except InputError:
            # A commit that a running calibration collected under our eyes is opened anew.
            if attempt == ATTEMPTS - 1 or not (run / "HEAD").exists():
                raise
    raise AssertionError("unreachable")


def _read(calibration: Calibration) -> Status:
    head, settings = calibration.head, calibration.record.settings
    windows, seq = calibration.token_shape
    batch = int(str(settings.get("batch", windows))) or 1  # a captured run has no tokens
    total = -(-windows // batch)
    batches = total if head.finished else head.cursor.batch
    generation = calibration.generation() if head.generation else None
    coverage = measure_coverage(generation.layout, generation.arrays) if generation else Coverage()
    arrays = generation.layout.arrays if generation else ()
    layers = 1 + max((layer for array in arrays for layer in array.layers), default=-1)
    events = calibration.events()
    commits = [event for event in events if event["event"] in ("created", "committed")]
    run, recipe = str(calibration.path), str(settings.get("recipe", ""))
    return Status(
        run=run,
        model=calibration.record.source.model,
        finished=head.finished,
        commit=head.number,
        generation=head.generation,
        batches=(batches, total),
        tokens=(min(batches * batch, windows) * seq, windows * seq),
        layers=(head.cursor.layer, layers) if head.cursor.layer and not head.finished else None,
        solutions={solver: (len(solved), layers) for solver, solved in solutions(head.objects).items()},
        commit_age=_age(commits[-1]["time"]) if commits else None,
        last_event=events[-1]["event"] if events else None,
        coverage=coverage,
        notes=calibration.notes,
        next_command=(
            export_command(run, recipe, recipe)
            if head.finished
            else calibrate_command({**settings, "run": run})
        ),
    )


def _age(time: str) -> float:
    return max(0.0, (datetime.now(UTC) - datetime.fromisoformat(time)).total_seconds())


def print_status(status: Status, as_json: bool) -> None:
    """The status on standard output, as a table or as one JSON object."""
    if as_json:
        print(json.dumps(asdict(status), indent=2))
        return
    age = "" if status.commit_age is None else f", {duration(status.commit_age)} ago"
    progress = [
        ("batches", f"{status.batches[0]:,} of {status.batches[1]:,}"),
        ("tokens", f"{status.tokens[0]:,} of {status.tokens[1]:,}"),
    ]
    if status.layers is not None:
        progress = [("layers", f"{status.layers[0]:,} of {status.layers[1]:,}")]
    rows = [
        ("run", f"{status.run} ({'finished' if status.finished else 'unfinished'})"),
        ("model", status.model),
        *progress,
        ("commit", f"{status.commit}{f' ({status.generation})' if status.generation else ''}{age}"),
        ("last event", status.last_event or "none"),
        *(
            ("solutions", f"{solver}: {solved} of {layers} layers")
            for solver, (solved, layers) in status.solutions.items()
        ),
        # Of layers that are still to come nothing can be said.
        *(coverage_rows(status.coverage) if status.layers is None else ()),
        *(("damage", note) for note in status.notes),
        ("next", status.next_command),
    ]
    print_rows(rows)
