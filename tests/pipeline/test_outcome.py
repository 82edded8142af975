"""Each way to end, with its message and exit code."""

from pathlib import Path

import pytest
import typer

from pipeline.outcome import describe, exit_codes
from pipeline.progress import reporting
from pipeline.versions import report
from stages.calibrate.signals import Interrupted
from stages.settings import ExportSettings
from state.errors import DamagedStore, IdentityMismatch, InputError, OutOfSpace, RunBusy, Stopped


class OutOfMemoryError(RuntimeError):
    """Named as torch's."""


@pytest.mark.parametrize(
    ("error", "message", "code"),
    [
        (InputError("DATA x: no such file."), "DATA x: no such file.", 2),
        (RunBusy("runs/a is in use"), "runs/a is in use", 2),
        (IdentityMismatch("config.hidden_size: 1 and 2", ()), "config.hidden_size: 1 and 2", 3),
        (DamagedStore("amax is damaged"), "amax is damaged", 4),
        (Stopped("stopped by SIGTERM"), "stopped by SIGTERM", 75),
        (
            KeyboardInterrupt(),
            "stopped. What was committed is safe; the same command goes on from there.",
            75,
        ),
        (PermissionError(13, "Permission denied", "/x/run"), "/x/run: Permission denied", 2),
        (OSError("no file is named"), "no file is named (OSError)", 2),
        (OSError(116, "Stale file handle"), "Stale file handle (ESTALE)", 2),
        (OSError(24, "Too many open files"), "Too many open files (EMFILE)", 2),
        (OSError(), "OSError", 2),
        (OSError(116, "Stale file handle", b"/x/\xff"), "/x/\udcff: Stale file handle", 2),
        (OSError(9, "Bad file descriptor", 7), "file descriptor 7: Bad file descriptor", 2),
        (MemoryError(), "out of memory: MemoryError A smaller --batch needs less.", 2),
        (InputError(""), "InputError", 2),
        (
            Interrupted("SIGHUP"),
            "stopped by SIGHUP. What was committed is safe; the same command goes on from there.",
            75,
        ),
        (
            OutOfMemoryError("tried 2 GiB.\nmore"),
            "out of memory: tried 2 GiB. A smaller --batch needs less.",
            2,
        ),
        (ZeroDivisionError("by zero\nat"), "ZeroDivisionError: by zero", 1),
        (ValueError(), "ValueError: ValueError", 1),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else "",
)
def test_message_and_code(error: BaseException, message: str, code: int) -> None:
    assert describe(error) == (message, code)


def test_out_of_space_says_how_much_is_needed() -> None:
    message, code = describe(OutOfSpace(Path("x"), needed=2_000, free=10, reason="No space left on device"))
    assert code == 2
    assert "2,000 bytes are needed and 10 are free" in message


def test_a_setting_is_named_as_it_is_typed() -> None:
    with pytest.raises(typer.Exit) as ended, exit_codes(debug=False):
        ExportSettings(run=Path("a"), out=Path("b"), shard_size=0)
    assert ended.value.exit_code == 2


def test_the_unexpected_names_versions_and_asks_for_debug(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(typer.Exit) as ended, exit_codes(debug=False):
        raise ZeroDivisionError("by zero")
    assert ended.value.exit_code == 1
    assert capsys.readouterr().err == (
        "holdfast: ZeroDivisionError: by zero\n"
        f"This is not expected. What was committed is safe. {report()}\n"
        "With --debug, the same command shows where it happened.\n"
    )


def test_the_unexpected_names_versions_with_debug_too(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(typer.Exit), exit_codes(debug=True):
        raise ZeroDivisionError("by zero")
    shown = capsys.readouterr().err
    assert "Traceback" in shown
    assert shown.endswith(f"{report()}\n")


def test_what_a_terminal_would_obey_is_written_out(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(typer.Exit), exit_codes(debug=False):
        raise InputError("\x1b[2Jbad\x00 \udcff\nand more")
    assert capsys.readouterr().err == "holdfast: \\x1b[2Jbad\\x00 \\udcff\nand more\n"


def test_an_error_without_a_file_says_what_was_being_done(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(typer.Exit), exit_codes(debug=False), reporting() as progress:
        progress.stage("reading the weights' identity")
        raise OSError(116, "Stale file handle")
    assert capsys.readouterr().err.splitlines()[-1] == (
        "holdfast: Stale file handle (ESTALE) while reading the weights' identity"
    )


def test_debug_shows_the_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(typer.Exit), exit_codes(debug=True):
        raise InputError("wrong")
    shown = capsys.readouterr().err
    assert "Traceback" in shown
    assert shown.endswith("holdfast: wrong\n")


def test_an_exit_goes_through() -> None:
    with pytest.raises(typer.Exit) as ended, exit_codes(debug=False):
        raise typer.Exit(0)
    assert ended.value.exit_code == 0
