"""Whatever happens to a stored file: a named error or an announced fallback, never a wrong value."""

import json
import shutil
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from state.durable import Disk
from state.errors import DamagedStore, InputError
from state.head import Cursor, Head
from state.identity import canonical_json, digest_json
from state.reader import open_run
from state.store import RunWriter
from state.update import Update
from tests.state import driver

GATE = "model.layers.L.mlp.experts.E.gate_proj.input"


def files_of(run: Path) -> list[str]:
    paths = (path.relative_to(run).as_posix() for path in run.rglob("*") if path.is_file())
    return sorted(path for path in paths if path not in (".lock", "events.jsonl"))


def truncations(data: bytes) -> Iterator[bytes]:
    for length in {0, 1, len(data) // 2, len(data) - 1} - {len(data)}:
        yield data[:length]


def flips(data: bytes) -> Iterator[bytes]:
    for position in {0, len(data) // 3, len(data) // 2, len(data) - 1}:
        yield data[:position] + bytes([data[position] ^ 0x10]) + data[position + 1 :]


def damages(run: Path) -> Iterator[tuple[str, Callable[[], object]]]:
    """Every file deleted, truncated, lengthened or with a flipped bit; each is undone before the next."""
    for name in files_of(run):
        path, data = run / name, (run / name).read_bytes()
        yield f"{name} deleted", path.unlink
        for number, bad in enumerate((*truncations(data), *flips(data), data + b"\0")):
            yield f"{name} variant {number}", partial(path.write_bytes, bad)
        path.write_bytes(data)


def test_every_damage_to_every_file_is_named_or_fallen_back_from(finished: Path) -> None:
    expected = {3: driver.statistics_after(3), 2: driver.statistics_after(2)}
    outcomes = set()
    for what, damage in damages(finished):
        damage()
        name = what.split(" ")[0]
        try:
            reader = open_run(finished)
        except DamagedStore as error:
            assert error.exit_code == 4
            assert name in error.objects, what
            outcomes.add("refused")
            assert not name.startswith(("HEAD", "heads", "calibration.zarr/g")), what
            continue
        number = reader.head.number
        np.testing.assert_equal(dict(reader.generation().arrays), expected[number], what)
        np.testing.assert_array_equal(reader.tokens, driver.TOKENS)
        if "000003" in name or name == "HEAD" or "/solutions/" in name:
            assert reader.notes and reader.notes[-1] == f"fell back to commit {number}", what
            outcomes.add(f"fell back to {number}")
        else:
            assert "000002" in name and reader.notes == (), what
    assert outcomes == {"refused", "fell back to 2", "fell back to 3"}


def test_reading_without_verification_never_gives_a_wrong_value(finished: Path) -> None:
    path = f"calibration.zarr/g000003/amax/{GATE}/c.1.0.0"
    reader = open_run(finished, verify=False)
    (finished / path).unlink()
    for at_once in (reader, open_run(finished, verify=False)):
        with pytest.raises(DamagedStore, match=f"array g000003/amax/{GATE}, c.1.0.0 is missing") as caught:
            at_once.amax("model.layers.2.mlp.experts.0.gate_proj")
        assert caught.value.objects == (path,)
        np.testing.assert_array_equal(at_once.amax("model.layers.0.mlp.experts.0.gate_proj"), [3.0, 4.0])


def test_resuming_goes_on_from_the_commit_before_under_a_new_number(finished: Path) -> None:
    (finished / "calibration.zarr/g000003/amax/lm_head.input/c.0").write_bytes(b"")
    notes = driver.drive(finished)
    assert notes == (
        "commit 3: array g000003/amax/lm_head.input, c.0 is damaged (its digest differs)",
        "fell back to commit 2",
    )
    reader = open_run(finished)
    assert (reader.notes, reader.head.number, reader.head.finished) == ((), 5, True)
    np.testing.assert_equal(dict(reader.generation().arrays), driver.statistics_after(3))
    assert [event["note"] for event in reader.events() if event["event"] == "recovered"] == list(notes)
    assert not (finished / "calibration.zarr/g000003").exists()


def test_a_lost_head_pointer_loses_no_work(finished: Path) -> None:
    (finished / "HEAD").unlink()
    assert open_run(finished).notes == (
        f"{finished / 'HEAD'} is missing or damaged",
        "fell back to commit 3",
    )
    driver.drive(finished)
    assert (open_run(finished).head.number, open_run(finished).notes) == (4, ())


def test_damage_to_what_all_commits_share_names_the_array(finished: Path) -> None:
    (finished / "calibration.zarr/tokens/c.0.0").write_bytes(b"x")
    with pytest.raises(DamagedStore, match=r"commit 3: array tokens, c\.0\.0 is damaged") as caught:
        RunWriter.resume(finished)
    assert "holdfast calibrate MODEL DATA NEW_RUN" in str(caught.value)


def test_half_a_copied_run_is_refused(finished: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(finished, copy, ignore=shutil.ignore_patterns("g0000*"))
    with pytest.raises(DamagedStore, match="is missing"):
        open_run(copy)


def test_two_generations_mixed_are_refused(finished: Path) -> None:
    path = f"amax/{GATE}/c.0.0.0"
    newer, older = (finished / f"calibration.zarr/g00000{number}/{path}" for number in (3, 2))
    newer.write_bytes(older.read_bytes())
    reader = open_run(finished)
    assert reader.head.number == 2 and f"array g000003/amax/{GATE}, c.0.0.0 is damaged" in reader.notes[0]
    older.write_bytes(b"")
    with pytest.raises(DamagedStore):
        open_run(finished)


def test_heads_of_another_run_are_refused(finished: Path, halfway_elsewhere: Path) -> None:
    shutil.copy(halfway_elsewhere / "heads/000003.json", finished / "heads/000003.json")
    reader = open_run(finished)
    assert reader.notes[0] == "commit 3: heads/000003.json is not the commit that HEAD names"
    assert reader.head.number == 2


@pytest.fixture
def halfway_elsewhere(tmp_path: Path, unsynced: None) -> Path:
    run = tmp_path / "elsewhere"
    driver.drive(run, until=2)
    with RunWriter.resume(run) as writer:
        writer.commit(Update(Cursor(batch=9), False, driver.observed(7)))
    return run


def test_a_newer_format_is_told_apart_from_damage(finished: Path) -> None:
    head = Head.decode((finished / "heads/000003.json").read_bytes(), finished)
    content = json.loads(head.encode())
    newer = content | {"format": 2, "surprise": 1}
    del newer["digest"]
    newer["digest"] = digest_json(newer)
    data = canonical_json(newer) + b"\n"
    (finished / "heads/000003.json").write_bytes(data)
    (finished / "HEAD").write_text(f"heads/000003.json {newer['digest']}\n")
    with pytest.raises(InputError, match="store format 2, and this Holdfast reads 1") as caught:
        open_run(finished)
    assert caught.value.exit_code == 2


class RacingDisk(Disk):
    """Lets the writer commit just before the reader reads an object for the first time."""

    def __init__(self, writer: RunWriter, updates: list[Update]) -> None:
        self.writer = writer
        self.updates = updates

    def read(self, path: Path) -> bytes:
        while self.updates and "heads" in path.parts:
            self.writer.commit(self.updates.pop())
        return super().read(path)


# Three new generations leave nothing that the reader knew; a commit without statistics leaves the older one.
@pytest.mark.parametrize(
    "updates", [3 * [Update(Cursor(), False, driver.observed(0))], [Update(Cursor(), True)]]
)
def test_a_reader_that_was_overtaken_rereads_head(halfway: Path, updates: list[Update]) -> None:
    newest = 2 + len(updates)
    with RunWriter.resume(halfway) as writer:
        reader = open_run(halfway, disk=RacingDisk(writer, list(updates)))
        assert (reader.head.number, reader.notes) == (newest, ())


def test_an_open_reader_whose_commit_was_collected_says_so(halfway: Path) -> None:
    reader = open_run(halfway)
    with RunWriter.resume(halfway) as writer:
        for _ in range(3):
            writer.commit(Update(Cursor(), False, driver.observed(0)))
    with pytest.raises(InputError, match="went on from commit 2 to 5 while it was read"):
        reader.amax("lm_head")


def test_strays_are_neither_seen_nor_kept(halfway: Path) -> None:
    strays = [
        "calibration.zarr/g000003/amax/zarr.json", "calibration.zarr/g000002/amax/stray/zarr.json",
        "calibration.zarr/solutions/awq-test/7/zarr.json", "heads/000003.json", "HEAD.tmp",
    ]  # fmt: skip
    for stray in strays:
        (halfway / stray).parent.mkdir(parents=True, exist_ok=True)
        (halfway / stray).write_text("{}")
    (halfway / "NOTES.md").write_text("mine")
    assert open_run(halfway).head.number == 2
    driver.drive(halfway)
    np.testing.assert_equal(dict(open_run(halfway).generation().arrays), driver.statistics_after(3))
    left = files_of(halfway)
    assert "NOTES.md" in left and "heads/000003.json" in left
    assert not any("stray" in path or "awq-test/7" in path or path == "HEAD.tmp" for path in left)
