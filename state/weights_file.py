"""Which file of a model folder says where its tensors are."""

import shlex
from pathlib import Path

from state.errors import InputError

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"

CONVERT = """\
import glob, torch; from safetensors.torch import save_file; \
read = lambda file: torch.load(file, map_location="cpu", weights_only=True, mmap=True); \
save_file({name: value.contiguous().clone() for file in glob.glob("pytorch_model*.bin") \
for name, value in read(file).items()}, "model.safetensors", {"format": "pt"})"""
"""Python that makes `model.safetensors` of the pickled weights in the folder where it is run."""


def weights_file(folder: Path) -> str:
    """`model.safetensors`, which holds the tensors itself, before the index of shards, as in transformers.

    Raises:
        InputError: there is neither; for pickled weights with the commands that convert them.
    """
    if not folder.is_dir():
        raise InputError(f"{folder} is not a model folder")
    for name in (SINGLE, INDEX):
        if (folder / name).exists():
            return name
    names = sorted(path.name for path in folder.iterdir())
    if any(name.startswith("pytorch_model") and name.endswith(".bin") for name in names):
        raise InputError(
            f"{folder} holds its weights as pickled .bin files alone, and Holdfast reads {SINGLE}. Make one "
            f"of them:\n  cd {shlex.quote(str(folder))}\n  python -c '{CONVERT}'"
        )
    present = ", ".join(names[:10]) or "nothing"
    raise InputError(f"{folder} has neither {SINGLE} nor {INDEX} (found: {present})")
