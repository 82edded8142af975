import errno
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import zarr

from state.claim import create_run
from state.durable import Disk
from state.errors import DamagedStore, InputError, OutOfSpace, RunBusy
from state.head import FORMAT, Cursor
from state.identity import digest, digest_json
from state.reader import open_run
from state.recovery import published
from state.store import RunWriter
from state.update import Generation, Solution, Update
from tests.state import driver
from tests.state.faults import CountingDisk, Crash, CrashingDisk, FailingDisk

GATE = "model.layers.L.mlp.experts.E.gate_proj.input"


def names(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir())


def test_create_publishes_the_record_and_the_tokens(tmp_path: Path, unsynced: None) -> None:
    run = tmp_path / "runs/new"
    with create_run(run, driver.RECORD, driver.TOKENS) as writer:
        assert (writer.head.number, writer.head.generation, writer.head.cursor) == (0, None, Cursor())
    assert names(run) == [".lock", "HEAD", "calibration.zarr", "events.jsonl", "heads", "run.json"]
    assert names(run / "heads") == ["000000.json", "run.json"]
    reader = open_run(run)
    assert reader.record == driver.RECORD
    np.testing.assert_array_equal(reader.tokens, driver.TOKENS)
    assert reader.tokens.dtype == np.int32
    assert reader.layout.arrays == ()


def test_a_finished_run_has_the_names_of_the_design(finished: Path) -> None:
    assert (finished / "HEAD").read_text().startswith("heads/000003.json xxh3:")
    assert names(finished / "heads") == ["000002.json", "000003.json", "run.json"]
    assert names(finished / "calibration.zarr") == ["g000002", "g000003", "solutions", "tokens", "zarr.json"]
    assert names(finished / "calibration.zarr/g000003") == ["amax", "tokens", "zarr.json"]
    assert names(finished / "calibration.zarr/g000003/amax") == ["lm_head.input", GATE, "zarr.json"]
    assert names(finished / f"calibration.zarr/g000003/amax/{GATE}") == ["c.0.0.0", "c.1.0.0", "zarr.json"]
    assert names(finished / "calibration.zarr/solutions/awq-test/2") == ["order", "scale", "zarr.json"]


def test_a_head_names_every_file_with_its_digest_and_has_its_own(finished: Path) -> None:
    content = json.loads((finished / "heads/000003.json").read_text())
    assert {key: content[key] for key in ("format", "number", "cursor", "finished", "generation")} == {
        "format": FORMAT,
        "number": 3,
        "cursor": {"pass_number": 0, "layer": 0, "batch": 3},
        "finished": True,
        "generation": "g000003",
    }
    files = {
        path.relative_to(finished).as_posix(): digest(path.read_bytes())
        for path in [finished / "run.json", *(finished / "calibration.zarr").rglob("*")]
        if path.is_file() and "g000002" not in path.parts
    }
    assert content["objects"] == files
    own = content.pop("digest")
    assert own == digest_json(content)
    copy = (finished / "heads/000003.json").read_bytes()
    assert (finished / "HEAD").read_bytes() == f"heads/000003.json {own}\n".encode() + copy
    assert (finished / "heads/run.json").read_bytes() == (finished / "run.json").read_bytes()


def test_plain_zarr_reads_the_store(finished: Path) -> None:
    root = zarr.open_group(finished / "calibration.zarr", mode="r")
    np.testing.assert_array_equal(root["tokens"][...], driver.TOKENS)
    array = root[f"g000003/amax/{GATE}"]
    assert (array.shape, array.chunks, array.dtype) == ((2, 3, 2), (1, 3, 2), np.float32)
    assert np.isnan(array.fill_value)
    assert array.metadata.dimension_names == ("layer", "expert", "channel")
    assert dict(array.attrs) == {
        "pattern": "model.layers.L.mlp.experts.E.gate_proj", "role": "input", "layers": [0, 2],
    }  # fmt: skip
    assert [codec.to_dict()["name"] for codec in array.metadata.codecs] == ["bytes", "crc32c"]
    np.testing.assert_array_equal(array[...], driver.statistics_after(3)[f"amax/{GATE}"])

    counts = root[f"g000003/tokens/{GATE}"]
    assert (counts.dtype, counts.fill_value, counts.chunks) == (np.int64, -1, (1, 3))
    np.testing.assert_array_equal(counts[...], [[6, 9, -1], [15, 18, -1]])
    assert root["g000003/tokens/lm_head.input"][()] == 6
    np.testing.assert_array_equal(root["solutions/awq-test/2/scale"][...], [0.5, 2.0])
    assert dict(root["solutions/awq-test/2"].attrs) == {"alpha": 0.5}


def test_a_chunk_of_fill_values_is_written_all_the_same(tmp_path: Path, unsynced: None) -> None:
    arrays = {key: np.full_like(values, np.nan if values.dtype.kind == "f" else -1)
              for key, values in driver.observed(0).arrays.items()}  # fmt: skip
    with create_run(tmp_path / "run", driver.RECORD, driver.TOKENS) as writer:
        head = writer.commit(Update(Cursor(), False, Generation(driver.layout(), arrays)))
    assert f"calibration.zarr/g000001/amax/{GATE}/c.1.0.0" in head.objects


def test_numbers_go_on_after_resuming_and_two_generations_stay(halfway: Path) -> None:
    with RunWriter.resume(halfway) as writer:
        assert (writer.head.number, writer.head.cursor, writer.notes) == (2, Cursor(batch=2), ())
        update = Update(Cursor(batch=3), False, driver.observed(0))
        assert [writer.commit(update).number for _ in range(3)] == [3, 4, 5]
    assert names(halfway / "heads") == ["000004.json", "000005.json", "run.json"]
    assert [name for name in names(halfway / "calibration.zarr") if name[0] == "g"] == ["g000004", "g000005"]


def test_a_commit_without_statistics_keeps_the_generation_and_the_one_before(halfway: Path) -> None:
    with RunWriter.resume(halfway) as writer:
        for batch in (3, 4):
            head = writer.commit(Update(Cursor(pass_number=1, batch=batch), finished=True))
    assert (head.number, head.generation) == (4, "g000002")
    assert names(halfway / "heads") == ["000001.json", "000004.json", "run.json"]
    assert [name for name in names(halfway / "calibration.zarr") if name[0] == "g"] == ["g000001", "g000002"]
    np.testing.assert_equal(dict(open_run(halfway).generation().arrays), driver.statistics_after(2))


def test_solutions_are_written_once_and_named_by_all_later_heads(finished: Path) -> None:
    before = (finished / "calibration.zarr/solutions/awq-test/2/scale/c.0").stat().st_ino
    other = Solution("awq-test", 0, {"scale": np.array(3.0, np.float64)})
    with RunWriter.resume(finished) as writer:
        with pytest.raises(ValueError, match="solutions/awq-test/2 is written once"):
            writer.commit(Update(Cursor(), True, solutions=driver.solutions(1)))
        with pytest.raises(ValueError, match="solutions/awq-test/0 is written once"):
            writer.commit(Update(Cursor(), True, solutions=(other, other)))
        head = writer.commit(Update(Cursor(), True, driver.observed(0), solutions=(other,)))
    assert (finished / "calibration.zarr/solutions/awq-test/2/scale/c.0").stat().st_ino == before
    assert {path.split("/")[3] for path in head.objects if "/solutions/awq-test/" in path} == {
        "zarr.json",
        "0",
        "2",
    }
    reader = open_run(finished)
    assert reader.solution("awq-test", 0).arrays["scale"] == 3.0
    stored = reader.solution("awq-test", 2)
    np.testing.assert_array_equal(stored.arrays["order"], np.array([1, 0]))
    assert stored.attributes == {"alpha": 0.5}
    assert list(stored.arrays) == ["order", "scale"] and len(stored.arrays) == 2
    assert "losses" not in stored.arrays
    with pytest.raises(KeyError, match="losses"):
        stored.arrays["losses"]
    with pytest.raises(InputError, match="no solution of 'awq-test' for layer 9"):
        reader.solution("awq-test", 9)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda arrays: arrays.pop("amax/lm_head.input"), "do not agree on.*lm_head"),
        (lambda arrays: arrays.update(extra=np.zeros(1)), "do not agree on.*extra"),
        (lambda arrays: arrays.update({"amax/lm_head.input": np.zeros(3, np.float32)}), r"float32\[3\]"),
        (lambda arrays: arrays.update({"amax/lm_head.input": np.zeros(2, np.float64)}), r"float64\[2\]"),
    ],
)
def test_arrays_that_do_not_fit_the_layout_are_refused_before_writing(
    halfway: Path, change: object, message: str
) -> None:
    arrays = dict(driver.observed(0).arrays)
    assert callable(change)
    change(arrays)
    with RunWriter.resume(halfway) as writer:
        with pytest.raises(ValueError, match=message):
            writer.commit(Update(Cursor(), False, Generation(driver.layout(), arrays)))
        assert not (halfway / "calibration.zarr/g000003").exists()
        assert writer.commit(Update(Cursor(), False, driver.observed(0))).number == 3


@pytest.mark.parametrize(
    "solution",
    [
        Solution("../awq", 0, {}),
        Solution("awq", 0, {"a/b": np.zeros(1)}),
        Solution("awq", 0, {"mask": np.zeros(1, np.bool_)}),
    ],
)
def test_solutions_with_bad_names_or_dtypes_are_refused(halfway: Path, solution: Solution) -> None:
    with RunWriter.resume(halfway) as writer, pytest.raises(ValueError, match=r"cannot be the name|is bool"):
        writer.commit(Update(Cursor(), False, solutions=(solution,)))


def test_resume_refuses_what_is_no_run(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="holdfast calibrate MODEL DATA"):
        RunWriter.resume(tmp_path / "absent")
    assert not (tmp_path / "absent").exists()
    with pytest.raises(InputError, match="is not a run"):
        open_run(tmp_path)


def test_a_second_writer_is_refused_at_once_and_freed_by_close(halfway: Path) -> None:
    with RunWriter.resume(halfway):
        with pytest.raises(RunBusy, match=f"{halfway} is being written by process {os.getpid()}"):
            RunWriter.resume(halfway)
        assert open_run(halfway).head.number == 2
    RunWriter.resume(halfway).close()


def test_a_failed_resume_frees_the_lock(halfway: Path) -> None:
    (halfway / "run.json").unlink()
    (halfway / "heads/run.json").unlink()
    for _ in range(2):
        with pytest.raises(DamagedStore):
            RunWriter.resume(halfway)


HOLDER = """
import sys
from state.store import RunWriter
with RunWriter.resume(sys.argv[1]):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_killing_the_writer_frees_the_run(halfway: Path) -> None:
    root = Path(__file__).parents[2]
    command = [sys.executable, "-c", HOLDER, str(halfway)]
    with subprocess.Popen(
        command, cwd=root, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as holder:
        assert holder.stdout is not None and holder.stdout.readline() == "held\n"
        with pytest.raises(RunBusy):
            RunWriter.resume(halfway)
        holder.kill()
        holder.wait()
        RunWriter.resume(halfway).close()


def test_a_closed_or_failed_writer_commits_no_more(halfway: Path) -> None:
    writer = RunWriter.resume(halfway)
    writer.close()
    with pytest.raises(RuntimeError, match="resume the run"):
        writer.commit(Update(Cursor(), False))
    with RunWriter.resume(halfway, FailingDisk(30, errno.ENOSPC)) as writer:
        with pytest.raises(OutOfSpace):
            writer.commit(Update(Cursor(), False, driver.observed(0)))
        with pytest.raises(RuntimeError, match="resume the run"):
            writer.commit(Update(Cursor(), False))


def test_moving_and_touching_a_run_changes_nothing(halfway: Path, tmp_path: Path) -> None:
    driver.drive(tmp_path / "undisturbed")
    moved = tmp_path / "elsewhere/renamed"
    shutil.copytree(halfway, moved)
    shutil.rmtree(halfway)
    for path in moved.rglob("*"):
        os.utime(path, (1, 2_000_000_000))
    assert driver.drive(moved) == ()
    np.testing.assert_equal(
        dict(open_run(moved).generation().arrays),
        dict(open_run(tmp_path / "undisturbed").generation().arrays),
    )


def test_accepted_environments_are_in_all_later_heads(halfway: Path) -> None:
    other = driver.RECORD.environment.model_copy(update={"device": "cuda"})
    with RunWriter.resume(halfway) as writer:
        writer.accept_environment(driver.RECORD.environment)
        writer.accept_environment(other)
        writer.commit(Update(Cursor(), False, driver.observed(0)))
    with RunWriter.resume(halfway) as writer:
        writer.accept_environment(other)
        assert writer.commit(Update(Cursor(), True)).accepted_environments == (other,)


def test_events_survive_a_torn_line(halfway: Path) -> None:
    with (halfway / "events.jsonl").open("ab") as file:
        file.write(b'{"time": "20')
    with RunWriter.resume(halfway) as writer:
        writer.event("stopped", signal="SIGTERM")
    events = open_run(halfway).events()
    assert [event["event"] for event in events] == ["created", "committed", "committed", "stopped"]
    assert events[2]["cursor"] == {"pass_number": 0, "layer": 0, "batch": 2}
    assert events[3]["signal"] == "SIGTERM"


def test_published_tells_a_run_from_an_unfinished_creation(halfway: Path, tmp_path: Path) -> None:
    disk = Disk()
    assert published(halfway, disk)
    (halfway / "HEAD").unlink()
    assert published(halfway, disk)
    assert not published(tmp_path / "absent", disk)
    with create_run(tmp_path / "new", driver.RECORD, driver.TOKENS):
        pass
    (tmp_path / "new/HEAD").unlink()
    assert published(tmp_path / "new", disk)
    steps = CountingDisk()
    create_run(tmp_path / "count", driver.RECORD, driver.TOKENS, steps).close()
    replaced = [step for step, _ in steps.steps].index("replace")
    with pytest.raises(Crash):
        create_run(tmp_path / "cut", driver.RECORD, driver.TOKENS, CrashingDisk(replaced))
    assert (tmp_path / "cut/heads/000000.json").exists() and not published(tmp_path / "cut", disk)


def test_no_torch_is_imported() -> None:
    code = "import sys, state, state.background, state.source; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[2]).returncode == 0
