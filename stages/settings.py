"""What a person asks of a stage. The command line builds these; library users may as well."""

from collections.abc import Container, Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

UnseenPolicy = Literal["layer", "weights-only", "error"]
ConflictPolicy = Literal["max", "error"]
DeadPolicy = Literal["floor", "error"]
ExpertInputScale = Literal["layer", "expert"]
Fold = Literal["auto", "none"]
Schedule = Literal["auto", "whole", "layerwise"]


class CalibrateSettings(BaseModel):
    """One calibration.

    model: a local Hugging Face folder or a hub id, at `revision`. data: JSONL, plain text or Parquet files,
    or the name of a `datasets` data set with `split` and `column`. samples, seq: windows, and tokens per
    window. batch: windows per forward. commit_every: seconds between two commits. resume: go on with an
    unfinished run, never, or only so. accept_environment: go on although library versions, device or batch
    size differ from those the run began with. schedule: the whole model on the device, or one decoder layer
    at a time, or whichever the recipe and the device need. activation_memory: bytes of hidden states kept in
    memory between layers; more go to a file under the run.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: str
    data: str
    run: Path
    revision: str | None = None
    split: str = "train"
    column: str | None = None
    recipe: str = "nvfp4"
    samples: int = Field(default=512, gt=0)
    seq: int = Field(default=2048, gt=0)
    batch: int = Field(default=8, gt=0)
    device: str = "auto"
    experts: Literal["grouped_mm", "eager"] = "grouped_mm"
    commit_every: float = Field(default=30.0, gt=0)
    resume: Literal["auto", "never", "required"] = "auto"
    accept_environment: bool = False
    trust_remote_code: bool = False
    schedule: Schedule = "auto"
    activation_memory: int = Field(default=8 * 2**30, gt=0)


POSITIONAL = ("model", "data", "run")
"""What `holdfast calibrate` takes without naming it."""


def as_options(settings: Mapping[str, Any], leave_out: Container[str]) -> list[str]:
    """A calibration's settings as options of the command line, but for defaults and what is left out."""
    options = []
    for name, field in CalibrateSettings.model_fields.items():
        value = settings.get(name, field.default)
        if name not in leave_out and value != field.default:
            flag = f"--{name.replace('_', '-')}"
            options += [flag] if value is True else [flag, str(value)]
    return options


class ExportSettings(BaseModel):
    """One export.

    run: a calibration run. out: the checkpoint folder to make. recipe: modelopt's name, or None for the one
    given to calibrate. model: where the source checkpoint is now, or None for where it was. unseen, conflict,
    dead, expert_input_scale: the policies of stages/export/unify.py. fold: a solver's input scales go into
    what stands before the weight, so that engines have nothing to apply (`auto`); or stay separate, as
    `pre_quant_scale` tensors, where modelopt's exporter leaves them so (`none`). overwrite: replace another
    export at `out`. partial: accept an unfinished run. shard_size: bytes of tensor data at which a new shard
    begins.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    run: Path
    out: Path
    recipe: str | None = None
    model: str | None = None
    unseen: UnseenPolicy = "layer"
    conflict: ConflictPolicy = "max"
    dead: DeadPolicy = "floor"
    expert_input_scale: ExpertInputScale = "layer"
    fold: Fold = "auto"
    overwrite: bool = False
    partial: bool = False
    trust_remote_code: bool = False
    shard_size: int = Field(default=5_000_000_000, gt=0)
