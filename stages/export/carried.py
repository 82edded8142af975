"""The files that an export carries along from the source."""

from pathlib import Path

from stages.model.folder import is_carried


def carried_files(folder: Path) -> list[str]:
    """Names, relative to the source folder, of the files to carry along; sorted."""
    names = (path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    return sorted(name.as_posix() for name in names if is_carried(name))
