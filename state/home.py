"""`~` in paths. A shell expands it only where it stands unquoted, which make and Python never see."""

from pathlib import Path

from state.errors import InputError


def expand_home(path: Path | str) -> Path:
    """The path, from the home folder where it begins with `~` or `~user`.

    Raises InputError where that user has no home folder.
    """
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        user = Path(path).parts[0]
        raise InputError(
            f"{path}: no home folder is known for {user}; for a folder of that name, write ./{path}"
        ) from error
