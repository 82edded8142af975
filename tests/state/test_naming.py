"""An OSError says which file it is about."""

from pathlib import Path

import pytest

from state.naming import naming


def test_an_error_of_an_open_file_gets_its_name() -> None:
    with pytest.raises(OSError) as raised, naming(Path("a/b")):
        raise OSError(116, "Stale file handle")
    assert (raised.value.filename, str(raised.value)) == ("a/b", "[Errno 116] Stale file handle: 'a/b'")


def test_a_name_that_is_there_stays() -> None:
    with pytest.raises(OSError) as raised, naming(Path("a/b")):
        raise OSError(24, "Too many open files", "c")
    assert raised.value.filename == "c"
