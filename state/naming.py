"""Errors of the operating system that say which file they are about."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def naming(path: Path | str) -> Iterator[None]:
    """Gives an OSError raised within the name of the file, where it has none: one that is raised by reading
    or writing an open file, such as ESTALE, knows only the reason.
    """
    try:
        yield
    except OSError as error:
        if error.filename is None and error.errno is not None:
            error.filename = str(path)
        raise
