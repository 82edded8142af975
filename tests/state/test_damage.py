"""Whatever happens to a stored file: a named error or an announced fallback, never a wrong value."""

import errno
import json
import os
import shutil
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from state.durable import Disk
from state.errors import DamagedStore, InputError, Unreadable
from state.head import Cursor, Head
from state.identity import canonical_json, digest_json
from state.objects import solutions
from state.reader import open_run
from state.store import RunWriter
from state.update import Solution, Update
from state.writing import Writing
from tests.state import driver
from tests.state.faults import UnreadableDisk
from tests.state.test_crash import tree

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
    """Only damage to the newest statistics themselves costs a commit; everything else costs less, and is
    said.
    """
    expected = {3: driver.statistics_after(3), 2: driver.statistics_after(2)}
    outcomes = set()
    for what, damage in damages(finished):
        damage()
        name = what.split(" ")[0]
        reader = open_run(finished)
        number = reader.head.number
        np.testing.assert_equal(dict(reader.generation().arrays), expected[number], what)
        assert reader.record == driver.RECORD
        if ("000002" in name and name.startswith("calibration.zarr")) or name == "heads/run.json":
            outcome = "nothing to say"
            assert (number, reader.notes) == (3, ()), what
        elif name == "heads/000002.json":
            outcome = "the older head is said"
            gone = "deleted" in what
            assert (number, bool(reader.notes)) == (3, not gone), what
            assert gone or reader.notes[0].startswith("the older commit 2: heads/000002.json is "), what
        elif "000003/" in name and not (name.count("/") == 3 and name.endswith("zarr.json")):
            outcome = "fell back"
            assert (number, reader.notes[-1]) == (2, "fell back to commit 2"), what
        elif "/solutions/awq-test/2/" in name:
            outcome = "one solution is lost"
            assert number == 3 and len(reader.notes) == 1, what
            assert "the solution of awq-test for layer 2 is lost, and nothing else" in reader.notes[0]
            with pytest.raises(InputError, match="no solution of 'awq-test' for layer 2"):
                reader.solution("awq-test", 2)
        else:
            outcome = "nothing is lost"
            assert number == 3 and len(reader.notes) == 1, what
            assert name in reader.notes[0] or name.rpartition("/")[2] in reader.notes[0], what
            assert reader.solution("awq-test", 2).arrays["scale"][1] == 2.0
        outcomes.add((outcome, name.split("/")[0]))
    assert outcomes >= {
        ("fell back", "calibration.zarr"),
        ("one solution is lost", "calibration.zarr"),
        ("nothing is lost", "HEAD"),
        ("nothing is lost", "heads"),
        ("nothing is lost", "run.json"),
        ("nothing is lost", "calibration.zarr"),
        ("the older head is said", "heads"),
    }


def test_after_any_damage_the_same_command_ends_with_the_same_bytes_and_deletes_nothing(
    tmp_path: Path, finished: Path
) -> None:
    """One flipped bit in each file in turn; what held the other bytes is set aside."""
    undisturbed = tree(finished)
    for number, name in enumerate(files_of(finished)):
        if name.startswith("heads/") or "000002" in name:
            continue
        run = shutil.copytree(finished, tmp_path / str(number))
        data = (run / name).read_bytes()
        bad = data[:-2] + bytes([data[-2] ^ 1]) + data[-1:]
        (run / name).write_bytes(bad)
        notes = drive_again(run)
        assert notes, name
        assert tree(run) == undisturbed, name
        if name != "HEAD":
            aside = [path for path in (run / "set-aside").rglob("*") if path.is_file()]
            assert bad in [path.read_bytes() for path in aside], name
            assert any(path.as_posix().endswith(name) for path in aside)
        assert open_run(run).notes == (), name


def drive_again(run: Path) -> tuple[str, ...]:
    """What a calibration does after damage: goes on, solves what is lost, and writes its tokens again."""
    with RunWriter.resume(run) as writer:
        notes = writer.notes
        writer.restore_tokens(driver.TOKENS)
        assert writer.missing == ()
    driver.drive(run)
    if "awq-test" not in solutions(open_run(run).head.objects):
        with RunWriter.resume(run) as writer:
            writer.commit(Update(writer.head.cursor, writer.head.finished, solutions=driver.solutions(1)))
    return notes


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
    assert notes[:2] == (
        "commit 3: array g000003/amax/lm_head.input, c.0 is damaged (its digest differs)",
        "fell back to commit 2",
    )
    assert "files are set aside" in notes[2] and len(notes) == 3
    reader = open_run(finished)
    assert (reader.notes, reader.head.number, reader.head.finished) == ((), 5, True)
    np.testing.assert_equal(dict(reader.generation().arrays), driver.statistics_after(3))
    assert [event["note"] for event in reader.events() if event["event"] == "recovered"] == list(notes)
    assert not (finished / "calibration.zarr/g000003").exists()


def test_a_lost_head_pointer_loses_no_work(finished: Path) -> None:
    (finished / "HEAD").unlink()
    assert open_run(finished).notes == (f"{finished / 'HEAD'} is missing",)
    driver.drive(finished)
    assert (open_run(finished).head.number, open_run(finished).notes) == (4, ())


def test_a_head_that_is_lost_or_damaged_loses_nothing(finished: Path) -> None:
    (finished / "heads/000003.json").write_bytes(b"{}")
    notes = driver.drive(finished)
    assert notes[0].startswith("commit 3: heads/000003.json is damaged (")
    assert notes[0].endswith("HEAD holds the same, so nothing is lost")
    reader = open_run(finished)
    assert (reader.head.number, reader.head.generation, reader.head.finished) == (4, "g000003", True)
    assert reader.solution("awq-test", 2).attributes == {"alpha": 0.5}


def test_without_head_and_newest_head_nothing_is_measured_again_unsaid(finished: Path) -> None:
    (finished / "HEAD").unlink()
    (finished / "heads/000003.json").unlink()
    with pytest.raises(DamagedStore, match="the head of commit 3 are lost") as caught:
        RunWriter.resume(finished)
    assert f"holdfast repair {finished}" in str(caught.value)
    assert (finished / "calibration.zarr/g000003/zarr.json").exists()


def test_damaged_tokens_leave_statistics_and_solutions_usable(finished: Path) -> None:
    (finished / "calibration.zarr/tokens/c.0.0").write_bytes(b"x")
    reader = open_run(finished)
    assert "export needs no tokens" in reader.notes[0]
    assert reader.token_shape == (4, 6)
    assert reader.solution("awq-test", 2).arrays["scale"][0] == 0.5
    with pytest.raises(DamagedStore, match=r"array tokens, c\.0\.0 is damaged"):
        _ = reader.tokens
    with RunWriter.resume(finished) as writer:
        assert writer.missing == ("calibration.zarr/tokens/c.0.0",)
        writer.restore_tokens(driver.TOKENS + 1)
        assert writer.missing == ("calibration.zarr/tokens/c.0.0",)
        writer.restore_tokens(driver.TOKENS)
        assert writer.missing == ()
    np.testing.assert_array_equal(open_run(finished).tokens, driver.TOKENS)


def test_one_bad_solution_costs_that_solution_alone(halfway: Path) -> None:
    others = tuple(
        Solution(solver, layer, {"scale": np.array([layer], np.float32)})
        for solver, layer in (("awq-test", 0), ("gptq-test", 2))
    )
    with RunWriter.resume(halfway) as writer:
        writer.commit(Update(Cursor(pass_number=1), True, solutions=others))
    before = (halfway / "calibration.zarr/solutions/gptq-test/2/scale/c.0").stat().st_ino
    (halfway / "calibration.zarr/solutions/awq-test/2/order/c.0").write_bytes(b"x")
    reader = open_run(halfway)
    assert solutions(reader.head.objects) == {"awq-test": {0}, "gptq-test": {2}}
    assert reader.head.finished and reader.solution("awq-test", 0).arrays["scale"] == 0
    with RunWriter.resume(halfway) as writer:
        assert solutions(writer.head.objects) == {"awq-test": {0}, "gptq-test": {2}}
        assert (writer.head.finished, writer.head.generation) == (True, "g000002")
        writer.commit(Update(writer.head.cursor, True, solutions=driver.solutions(1)))
    assert open_run(halfway).notes == ()
    assert (halfway / "calibration.zarr/solutions/gptq-test/2/scale/c.0").stat().st_ino == before


def test_solutions_outlive_statistics_that_come_out_the_same_again(finished: Path) -> None:
    late = Solution("gptq-test", 0, {"scale": np.array([7.0], np.float32)})
    with RunWriter.resume(finished) as writer:
        writer.commit(Update(Cursor(pass_number=1), True, solutions=(late,)))
    (finished / "calibration.zarr/g000003/amax/lm_head.input/c.0").write_bytes(b"")
    with RunWriter.resume(finished) as writer:
        assert not writer.head.finished
        assert solutions(writer.head.objects) == {"awq-test": {2}, "gptq-test": {0}}
    driver.drive(finished)
    reader = open_run(finished)
    assert (reader.head.finished, reader.head.solved_behind) == (True, None)
    assert reader.solution("gptq-test", 0).arrays["scale"] == 7.0


def test_solutions_of_statistics_that_come_out_otherwise_are_set_aside(finished: Path) -> None:
    late = Solution("gptq-test", 0, {"scale": np.array([7.0], np.float32)})
    with RunWriter.resume(finished) as writer:
        writer.commit(Update(Cursor(pass_number=1), True, solutions=(late,)))
    (finished / "calibration.zarr/g000003/amax/lm_head.input/c.0").write_bytes(b"")
    with RunWriter.resume(finished) as writer:
        assert writer.head.solved_behind is not None
        writer.commit(Update(Cursor(batch=3), True, driver.observed(1)))
        assert "came out otherwise" in writer.notes[-1]
        assert solutions(writer.head.objects) == {}
    assert len(list((finished / "set-aside").rglob("solutions/awq-test/2/scale/c.0"))) == 1
    with RunWriter.resume(finished) as writer:
        writer.commit(Update(writer.head.cursor, True, solutions=(*driver.solutions(1), late)))
    assert open_run(finished).notes == ()


@pytest.mark.parametrize("error", [errno.EIO, errno.ESTALE, errno.EMFILE])
@pytest.mark.parametrize(
    "name", ["HEAD", "heads/000003.json", "run.json", "g000003/amax/lm_head.input/c.0", "tokens/c.0.0"]
)
def test_what_can_not_be_read_now_costs_nothing(
    finished: Path, monkeypatch: pytest.MonkeyPatch, error: int, name: str
) -> None:
    monkeypatch.setattr("state.durable.PAUSES", (0, 0, 0))
    before = {path: path.read_bytes() for path in finished.rglob("*") if path.is_file()}
    with RunWriter.resume(finished, UnreadableDisk(error, times=2, name=name)) as writer:
        assert (writer.head.number, writer.notes) == (3, ())
    for attempt in (open_run, RunWriter.resume):
        with pytest.raises(Unreadable, match="try again") as caught:
            attempt(finished, disk=UnreadableDisk(error, times=1000, name=name))
        assert (caught.value.exit_code, caught.value.number) == (2, error)
        assert str(caught.value.path).endswith(name) and os.strerror(error) in str(caught.value)
    assert {path: path.read_bytes() for path in finished.rglob("*") if path.is_file()} == before


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
    assert reader.notes[0].startswith("commit 3: heads/000003.json is not the commit that HEAD names")
    assert (reader.head.number, reader.head.cursor) == (3, Cursor(batch=3))


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
    newer = content | {"format": 3, "surprise": 1}
    del newer["digest"]
    newer["digest"] = digest_json(newer)
    data = canonical_json(newer) + b"\n"
    (finished / "heads/000003.json").write_bytes(data)
    (finished / "HEAD").write_text(f"heads/000003.json {newer['digest']}\n")
    with pytest.raises(InputError, match="store format 3, and this Holdfast reads 1 to 2") as caught:
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


def test_files_that_no_record_names_are_neither_seen_nor_touched(halfway: Path) -> None:
    strays = [
        "calibration.zarr/g000003/amax/zarr.json", "calibration.zarr/g000002/amax/stray/zarr.json",
        "calibration.zarr/g000001/mine.txt", "calibration.zarr/solutions/awq-test/7/zarr.json",
        "heads/000003.json", "heads/000003.writing", "heads/notes.txt", "set-aside/mine", "activations/mine",
        "NOTES.md",
    ]  # fmt: skip
    for stray in strays:
        (halfway / stray).parent.mkdir(parents=True, exist_ok=True)
        (halfway / stray).write_text("mine")
    assert open_run(halfway).head.number == 2
    notes = driver.drive(halfway)
    assert len(notes) == 1
    assert notes[0].startswith("left alone, as no commit names them: calibration.zarr/g000001/")
    np.testing.assert_equal(dict(open_run(halfway).generation().arrays), driver.statistics_after(3))
    assert [stray for stray in strays if (halfway / stray).read_text() != "mine"] == []
    assert open_run(halfway).head.generation == "g000004"
    assert [path.name for path in (halfway / "calibration.zarr/g000001").iterdir()] == ["mine.txt"]


@pytest.mark.parametrize("damage", [Path.unlink, lambda path: path.write_bytes(path.read_bytes()[:-1])])
def test_what_is_set_aside_for_a_lost_head_has_names_that_commits_give(
    halfway: Path, damage: Callable[[Path], object]
) -> None:
    (halfway / "heads/notes.txt").write_text("mine")
    (halfway / "heads/000003.json").write_text("{}")
    damage(halfway / "HEAD")
    notes = driver.drive(halfway)
    assert (halfway / "heads/notes.txt").read_text() == "mine"
    assert "left alone, as no commit names them: heads/notes.txt" in notes
    assert [path.name for path in halfway.glob("set-aside/*/heads/*")] == ["000003.json"]


def test_a_file_in_the_way_is_refused_by_name(halfway: Path) -> None:
    (halfway / "HEAD.tmp").write_text("mine")
    with pytest.raises(InputError, match=r"HEAD\.tmp is in the way"):
        RunWriter.resume(halfway)
    (halfway / "HEAD.tmp").rename(halfway / "calibration.zarr/solutions/awq-test/other")
    with RunWriter.resume(halfway) as writer:
        place = halfway / "calibration.zarr/solutions/awq-test/5/zarr.json"
        place.parent.mkdir()
        place.write_text("mine")
        with pytest.raises(InputError, match=r"5/zarr\.json is in the way"):
            writer.commit(Update(Cursor(), False, solutions=(Solution("awq-test", 5, {}),)))
    RunWriter.resume(halfway).close()
    assert place.read_text() == "mine"


@pytest.mark.parametrize("name", ["calibration.zarr", "heads", "calibration.zarr/g000001", "set-aside"])
def test_a_link_inside_a_run_leads_nowhere(halfway: Path, tmp_path: Path, name: str) -> None:
    elsewhere = tmp_path / "elsewhere"
    (halfway / "calibration.zarr/g000002/amax/lm_head.input/c.0").write_bytes(b"")
    if name == "set-aside":
        elsewhere.mkdir()
    else:
        (halfway / name).rename(elsewhere)
    (halfway / name).symlink_to(elsewhere)
    before = {path: path.read_bytes() for path in elsewhere.rglob("*") if path.is_file()}
    refused = pytest.raises(InputError, match=f"{halfway / name} is a symbolic link")
    with refused, RunWriter.resume(halfway) as writer:
        for _ in range(2):
            writer.commit(Update(Cursor(), False, driver.observed(0)))
    assert {path: path.read_bytes() for path in elsewhere.rglob("*") if path.is_file()} == before


def test_a_head_from_elsewhere_leads_nowhere(halfway: Path, tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.mkdir()
    (victim / "zarr.json").write_text("mine")
    head = Head.decode((halfway / "heads/000001.json").read_bytes(), halfway)
    for number, change in enumerate(
        [
            {"generation": "../../victim"},
            {"objects": head.objects | {"calibration.zarr/../../victim/zarr.json": "x"}},
        ]
    ):
        run = shutil.copytree(halfway, tmp_path / f"from elsewhere {number}")
        content = json.loads(head.encode()) | change
        del content["digest"]
        content["digest"] = digest_json(content)
        for name in ("heads/000001.json", "heads/000001.dropped"):
            (run / name).write_bytes(canonical_json(content) + b"\n")
            with pytest.raises(DamagedStore, match="should not be trusted") as caught:
                RunWriter.resume(run)
            assert caught.value.exit_code == 4
            (run / name).unlink()
    assert (victim / "zarr.json").read_text() == "mine"


def test_a_record_of_writing_from_elsewhere_leads_nowhere(halfway: Path, tmp_path: Path) -> None:
    (tmp_path / "victim.txt").write_text("mine")
    (halfway / "NOTES.md").write_text("mine")
    for path in ("../victim.txt", "NOTES.md", "HEAD", "run.json", "calibration.zarr/tokens/c.0.0"):
        record = Writing(9, (path,))
        (halfway / record.path).write_bytes(record.encode())
        RunWriter.resume(halfway).close()
        assert open_run(halfway).notes == ()
    assert (tmp_path / "victim.txt").exists() and (halfway / "NOTES.md").exists()


def test_an_older_head_that_is_damaged_is_said_and_set_aside(finished: Path) -> None:
    (finished / "heads/000002.json").write_bytes(b"{}")
    said = open_run(finished).notes
    assert said[0].startswith("the older commit 2: heads/000002.json is damaged (")
    assert driver.drive(finished)[0] == said[0]
    assert [path.read_bytes() for path in (finished / "set-aside").rglob("000002.json")] == [b"{}"]
    assert open_run(finished).notes == ()
