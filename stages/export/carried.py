"""The files that an export carries along from the source."""

from collections.abc import Collection, Iterator
from pathlib import Path

from stages.export.records import MARK, RECORDS, REPORT
from stages.model.folder import WEIGHTS
from stages.model.plausible import CONFIG
from state.paths import HEAD

NOT_CARRIED = RECORDS | {
    REPORT,
    CONFIG,
    "hf_quant_config.json",
    "quantize_config.json",
    "quant_config.json",
    "params.json",
    "README.md",
    "verify_report.json",
}
"""Files that an export writes itself, or that tell of other weights, such as their model card."""
OTHERS = (CONFIG, HEAD, MARK, "pyvenv.cfg")
"""A folder inside the source that holds one of these is something of its own: a model, a run, an export under
way, an environment.
"""


def carried_files(folder: Path, apart: Collection[Path] = ()) -> list[str]:
    """Names, relative to the source folder, of the files to carry along; sorted.

    apart: folders that are no part of the model, wherever they lie: the run, and what is exported.
    """
    elsewhere = {path.resolve() for path in apart}
    names = (path.relative_to(folder) for path in _files(folder, elsewhere))
    return sorted(name.as_posix() for name in names if _is_carried(name))


def _files(folder: Path, apart: Collection[Path]) -> Iterator[Path]:
    for path in folder.iterdir():
        if path.is_file():
            yield path
        elif path.is_dir() and not _is_apart(path, apart):
            yield from _files(path, apart)


def _is_apart(folder: Path, apart: Collection[Path]) -> bool:
    hidden = folder.name.startswith(".") or folder.is_symlink()
    return hidden or folder.resolve() in apart or any((folder / name).exists() for name in OTHERS)


def _is_carried(name: Path) -> bool:
    """Whether a file, by its relative path, goes along: all but weights and records of them, and hidden
    files.
    """
    hidden = any(part.startswith((".", "__pycache__")) for part in name.parts)
    weights = name.name.lower().endswith((*WEIGHTS, ".index.json")) or ".onnx_data" in name.name
    return not (hidden or weights or name.name in NOT_CARRIED)
