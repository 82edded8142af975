"""The world of a trial: a model small enough to be measured in a second, a text, and files of a person's own.

LAB/source/                 model and text, read by all trials and changed by none
LAB/templates/NAME/         states that commands begin from, made once
LAB/trials/NUMBER/          one trial: `run`, `out`, and what a person keeps beside and inside them
"""

import hashlib
import json
import os
import shutil
from pathlib import Path

from pipeline import demo

SMALL = {
    "hidden_size": 64,
    "head_dim": 16,
    "intermediate_size": 64,
    "moe_intermediate_size": 32,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "num_hidden_layers": 3,
    "vocab_size": 300,
}
"""What makes the demo's model smaller still."""

MINE = "mine"  # begins or is the name of everything that is a person's own
BESIDE = {
    "mine/notes.txt": "these are mine\n",
    "mine.partial/model.safetensors": "mine\n",
    "mine.replaced/holdfast_export.json": "{}\n",
    "activations/mine.raw": "mine\n",
    "calibration.zarr/mine.json": "{}\n",
    "out.txt.mine": "mine\n",
}
"""What a person has beside a run and an export, from the start."""
IN_RUN = {
    "mine.md": "what I think of this run\n",
    "heads/mine.txt": "mine\n",
    "calibration.zarr/mine/data.bin": "mine\n",
}
"""What a person puts into a run that exists."""
IN_OUT = {"mine.md": "a model card of my own\n", "mine/eval/scores.json": "[]\n"}
"""What a person puts into an export that is finished."""


def make_source(folder: Path) -> None:
    """Write `folder/model` and `folder/text.jsonl`. Changes the demo's settings: call it in a process of its
    own."""
    demo.CONFIG.update(SMALL)
    demo.UNREACHED_EXPERT, demo.DEAD_CHANNEL = (1, 3), (1, 17)
    demo.make_demo(folder)
    text = (folder / "text.jsonl").read_text(encoding="utf-8")
    short = (json.dumps({"text": json.loads(line)["text"][:2000]}) for line in text.splitlines()[:3])
    (folder / "text.jsonl").write_text("\n".join(short) + "\n", encoding="utf-8")


def put_files(folder: Path, files: dict[str, str]) -> None:
    """Write text files below a folder."""
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text, encoding="utf-8")


def begin(trial: Path, template: Path | None) -> None:
    """Make a trial's folder from a template, or as a person's who has begun nothing yet."""
    if template is None:
        trial.mkdir(parents=True)
        put_files(trial, BESIDE)
    else:
        shutil.copytree(template, trial, symlinks=True)


def files_of(folder: Path) -> dict[str, bytes]:
    """Every file below a folder, by its relative path; what is not there has none."""
    found = {}
    for parent, _, names in os.walk(folder):
        for name in names:
            path = Path(parent, name)
            if path.is_file():
                found[path.relative_to(folder).as_posix()] = path.read_bytes()
    return found


def mine(trial: Path) -> dict[str, str]:
    """Digests of all that is a person's own in a trial, and of nothing else."""
    return {name: hashlib.sha256(data).hexdigest() for name, data in files_of(trial).items() if MINE in name}


def changed(before: dict[str, str], after: dict[str, str]) -> str:
    """The names of what is not the same in both, for a message."""
    return ", ".join(sorted(name for name in before | after if before.get(name) != after.get(name)))
