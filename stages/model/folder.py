"""MODEL, as a person gives it: a folder here, or a model on the hub."""

import os
from collections.abc import Mapping
from pathlib import Path

from stages.progress import Progress
from state.errors import InputError
from state.home import expand_home
from state.identity import digest

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "tekken.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "tekken.json",
    "chat_template.jinja",
    "chat_template.json",
)
WEIGHTS = (
    ".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".ot", ".gguf", ".ggml", ".onnx",
    ".onnx_data", ".tflite", ".params", ".xml", ".mlmodel", ".npz", ".npy", ".pkl", ".pickle", ".zip",
    ".tar", ".gz",
)  # fmt: skip
"""Suffixes of files that hold weights, in any format."""
RECORDS = frozenset(
    {
        "config.json",
        "model.safetensors.index.json",
        "hf_quant_config.json",
        "quantize_config.json",
        "quant_config.json",
        "README.md",
        "params.json",
        "export_report.json",
        "holdfast_export.json",
        "holdfast_journal.jsonl",
        "holdfast_partial.json",
    }
)
"""Files that an export writes itself, or that tell of other weights, such as their model card."""
NOT_WANTED = tuple(f"*{suffix}" for suffix in WEIGHTS if suffix != ".safetensors")
"""What is not fetched from the hub."""

ELSEWHERE = "--"
"""Between the names of a repository and of a file in it, where a model takes its code from another one."""


def locate(model: str, revision: str | None, progress: Progress) -> Path:
    """The folder that holds the model: itself, or the hub's snapshot, fetched if it has to be.

    Raises InputError when there is no such folder and the hub has no such model, or can't be reached.
    """
    folder = expand_home(model)
    if folder.is_dir():
        if revision is not None:
            raise InputError(
                f"--revision {revision} was given, but {model} is a local folder; leave --revision out"
            )
        return folder
    if folder.is_absolute() or model.startswith((".", "~")) or model.count("/") != 1:
        raise InputError(
            f"there is no folder {model}; MODEL is a Hugging Face model folder or a hub id like org/name"
        )
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    progress.stage(f"fetching {model} from the hub")
    try:
        return Path(snapshot_download(model, revision=revision, ignore_patterns=list(NOT_WANTED)))
    except LocalEntryNotFoundError as error:
        offline = " (HF_HUB_OFFLINE is set)" if os.environ.get("HF_HUB_OFFLINE") else ""
        raise InputError(
            f"{model} is neither a folder here nor in the hub's cache, and the hub can't be reached{offline}"
        ) from error
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        raise InputError(
            f"{model} can't be fetched from the hub: {str(error).strip().splitlines()[0]}"
        ) from error


def is_carried(name: Path) -> bool:
    """Whether a file of a model folder, by its relative path, goes along with the model's weights: all but
    weights and records of them, and hidden files.
    """
    hidden = any(part.startswith((".", "__pycache__")) for part in name.parts)
    index = name.name.endswith(".index.json")
    weights = name.name.lower().endswith(WEIGHTS) or ".onnx_data" in name.name
    return not (hidden or index or weights or name.name in RECORDS)


def tokenizer_digests(folder: Path) -> dict[str, str]:
    """Digest of every file that makes up the tokenizer, by name. Empty where the folder has none."""
    files = (
        [folder / name for name in TOKENIZER_FILES]
        + sorted(folder.glob("*.model"))
        + sorted(folder.glob("*.tiktoken"))
    )
    return {path.name: digest(path.read_bytes()) for path in files if path.is_file()}


def recorded_code(folder: Path, recorded: Mapping[str, str]) -> dict[str, str]:
    """What the model's own code, recorded as file → digest, is in a folder now: files that are gone are left
    out, and those of another repository are as they were recorded.
    """
    found = {name: seen for name, seen in recorded.items() if ELSEWHERE in name}
    here = [name for name in recorded if name not in found and (folder / name).is_file()]
    return found | {name: digest((folder / name).read_bytes()) for name in here}
