"""The files of a checkpoint: headers, index and both configurations."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stages.engines.findings import Finding, without_path
from stages.engines.stated import Stated, differences, group_faults, inline, separate
from state.errors import InputError
from state.source import Source, read_json
from state.weights_file import INDEX, SINGLE

CONFIG, SEPARATE = "config.json", "hf_quant_config.json"
METHOD = "modelopt"
UNFINISHED = "holdfast_partial.json"
"""Lies in a folder that an export has not finished: what is in it may be of two exports."""


@dataclass(frozen=True)
class Files:
    """What the files of a checkpoint say. source: None where they can't be read. stated: what engines read of
    the configuration, None where there is none.
    """

    folder: Path
    source: Source | None
    stated: Stated | None
    layers: int | None
    findings: tuple[Finding, ...]


def read_files(folder: Path) -> Files:
    """Read every header and both configurations.

    Raises InputError where there is no folder, or a configuration is of another layout than modelopt's.
    """
    if not folder.is_dir():
        raise InputError(f"there is no folder {folder}; OUT is the folder of a checkpoint")
    findings: list[Finding] = []
    config = _json(folder, CONFIG, findings)
    own = _json(folder, SEPARATE, findings) if (folder / SEPARATE).exists() else None
    source = _source(folder, findings)
    stated = _stated(folder, config or {}, own, findings)
    return Files(folder, source, stated, _layers(config or {}), tuple(findings))


def _layers(config: Mapping[str, Any]) -> int | None:
    text = config.get("text_config")
    count = (text if isinstance(text, Mapping) else config).get("num_hidden_layers")
    return count if type(count) is int else None


def _source(folder: Path, findings: list[Finding]) -> Source | None:
    try:
        source = Source.open(folder)
    except InputError as error:
        findings.append(Finding("files", "safetensors", without_path(folder, str(error))))
        return None
    read = {Path(file).name for file in source.files}
    for path in sorted(folder.glob("*.safetensors")):
        if path.name not in read:
            findings.append(
                Finding("stale-shard", path.name, f"is no part of what {_read_first(source)} says")
            )
    if SINGLE in source.files and (folder / INDEX).exists():
        findings.append(Finding("stale-shard", INDEX, f"lies beside {SINGLE}, which readers take first"))
    elif (folder / INDEX).exists():
        metadata = read_json(folder / INDEX, (folder / INDEX).read_bytes()).get("metadata")
        total = metadata.get("total_size") if isinstance(metadata, Mapping) else None
        held = sum(entry.nbytes for entry in source.tensors.values())
        if total is not None and total != held:
            findings.append(Finding("index-size", INDEX, f"says {total:,} bytes, the tensors have {held:,}"))
    return source


def _read_first(source: Source) -> str:
    return SINGLE if SINGLE in source.files else INDEX


def _stated(
    folder: Path, config: Mapping[str, Any], own: Mapping[str, Any] | None, findings: list[Finding]
) -> Stated | None:
    written = config.get("quantization_config")
    method = written.get("quant_method") if isinstance(written, Mapping) else None
    if isinstance(written, Mapping) and not str(method).startswith(METHOD):
        raise InputError(
            f"{folder}/{CONFIG} says quant_method {method!r}, and verify reads the layout of modelopt alone; "
            "give a checkpoint that `holdfast export` or modelopt wrote"
        )
    first = inline(written) if isinstance(written, Mapping) else None
    held = own.get("quantization") if own is not None else None
    second = separate(held) if isinstance(held, Mapping) else None
    if own is not None and second is None:
        findings.append(Finding("config", SEPARATE, "holds no quantization"))
    stated = first or second
    if stated is None:
        findings.append(Finding("config", CONFIG, f"has no quantization_config, and there is no {SEPARATE}"))
        return None
    if first is not None and isinstance(written, Mapping):
        findings += [Finding("config-groups", CONFIG, says) for says in group_faults(written, first)]
    if first is not None and second is not None:
        findings += [Finding("config-disagree", CONFIG, says) for says in differences(first, second)]
    if stated.algo is None and stated.kv is None:
        findings.append(Finding("config", CONFIG, "says no quant_algo"))
    return stated


def _json(folder: Path, name: str, findings: list[Finding]) -> dict[str, Any] | None:
    try:
        content = read_json(folder / name, (folder / name).read_bytes(), unique=False)
    except FileNotFoundError:
        findings.append(Finding("config", name, "is missing"))
        return None
    except InputError as error:
        findings.append(Finding("config", name, without_path(folder, str(error))))
        return None
    if not isinstance(content, dict):
        findings.append(Finding("config", name, "is no JSON object"))
        return None
    return content
