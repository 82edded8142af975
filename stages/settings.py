"""What a person asks of a stage. Each field is an option of the command line, its description the help."""

import re
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, field_validator

from state.home import expand_home

UnseenPolicy = Literal["layer", "weights-only", "error"]
ConflictPolicy = Literal["max", "error"]
DeadPolicy = Literal["floor", "error"]
ExpertInputScale = Literal["layer", "expert"]
Fold = Literal["auto", "none"]
Mxfp4Scale = Literal["max", "cast"]
ScaleChoice = Literal["max", "mse", "four_over_six"]
Schedule = Literal["auto", "whole", "layerwise"]
Dtype = Literal["auto", "float32", "bfloat16", "float16"]
Take = Literal["first", "spread"]
Target = Literal["any", "vllm", "sglang", "trtllm"]

LONGEST = 1000 * 86400.0
"""Seconds of the longest duration: threads can't wait for much longer."""


def _from_home(value: Any) -> Any:
    """A path that begins with `~` written out; anything else, such as a hub id, untouched."""
    return str(expand_home(value)) if isinstance(value, str | Path) and str(value).startswith("~") else value


def seconds(duration: str) -> float:
    """`90`, `90s`, `45m`, `3h55m`, `1d` in seconds. Raises ValueError for anything else, no time included."""
    units = re.fullmatch(
        r"(?:(\d+)d)?(?:(\d+)h)?(?:(\d+)m)?(?:(\d+(?:\.\d+)?)s?)?", duration.strip(), re.ASCII
    )
    parts = [float(part or 0) for part in units.groups()] if units else [0.0]
    total = sum(part * unit for part, unit in zip(parts, (86400, 3600, 60, 1), strict=False))
    if not 0 < total <= LONGEST:
        raise ValueError("a time such as 90, 90s, 45m, 3h55m or 1d is needed")
    return total


def _duration(value: Any) -> Any:
    """A duration as it was written; a number is seconds."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        value = str(value)
    if isinstance(value, str):
        seconds(value)
    return value


OptionalDuration = Annotated[str | None, BeforeValidator(_duration)]
Folder = Annotated[Path, BeforeValidator(_from_home)]
OptionalFolder = Annotated[Path | None, BeforeValidator(_from_home)]
Place = Annotated[str, BeforeValidator(_from_home)]
"""A path, or a name that is looked up elsewhere."""
OptionalPlace = Annotated[str | None, BeforeValidator(_from_home)]


class Settings(BaseModel):
    """What every stage's settings have in common: they do not change, and know no other names.

    A field without a default is given by its position on the command line, any other as an option.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    @field_validator("*", mode="before")
    @classmethod
    def _is_text(cls, value: Any) -> Any:
        """Settings are recorded as UTF-8; names of files in other encodings can't be."""
        if isinstance(value, str | Path):
            try:
                str(value).encode()
            except UnicodeEncodeError:
                raise ValueError("this is not UTF-8; rename it, or give a link to it") from None
        return value


class CalibrateOptions(Settings):
    """What is measured, and how; all that a calibration is asked for but its run."""

    model: Place = Field(description="Folder of a Hugging Face model, or its hub id.")
    data: Place = Field(
        description="JSON, JSONL, CSV, TSV, Parquet, Arrow or plain text, also as .gz or .zst: a file, a "
        "folder, a glob in quotes, or a `datasets` name (NAME or NAME:CONFIG). Chat messages go through the "
        "chat template."
    )
    revision: str | None = Field(default=None, description="Branch, tag or commit on the hub.")
    split: str = Field(
        default="train",
        description="Split of a data set or folder, and which of its rows, such as train[:1000] or "
        "train[10%:20%].",
    )
    column: str | None = Field(
        default=None, description="Column of text or messages. Found by itself where it is plain."
    )
    recipe: Place = Field(
        default="nvfp4",
        description="modelopt's name of a recipe, remembered as export's default. AWQ and GPTQ are solved "
        "here; any other is only checked.",
    )
    take: Take = Field(
        default="first",
        description="Which windows of DATA: the first ones, or windows spread evenly over the whole of it.",
    )
    samples: int = Field(default=512, gt=0, description="Windows of text.")
    seq: int = Field(default=2048, gt=0, description="Tokens per window.")
    batch: int = Field(default=8, gt=0, description="Windows per forward.")
    dtype: Dtype = Field(
        default="auto",
        description="What the model is loaded, computed and exported in; auto: the checkpoint's own. "
        "bfloat16 for a float16 model that overflows.",
    )
    device: str = Field(default="auto", description="auto, cpu, cuda or cuda:N.")
    experts: Literal["grouped_mm", "eager"] = Field(
        default="grouped_mm",
        description="How fused experts are computed. grouped_mm is fast; eager works where it does not.",
    )
    commit_every: float = Field(
        default=30.0, gt=0, description="Seconds between two commits: the most work that a crash can cost."
    )
    stop_after: OptionalDuration = Field(
        default=None,
        description="Commit and stop after this time, such as 3h55m, as if a signal had come; exit code 75.",
    )
    resume: Literal["auto", "never", "required"] = Field(
        default="auto", description="Go on with the run that is at RUN: if there is one, never, or only so."
    )
    accept_environment: bool = Field(
        default=False,
        description="Go on with an unfinished run although versions, device or batch differ. Recorded; the "
        "statistics may then differ in the last bit from those of an undisturbed run.",
    )
    trust_remote_code: bool = Field(default=False, description="Run Python code that comes with the model.")
    schedule: Schedule = Field(
        default="auto",
        description="The whole model on the device, or one decoder layer at a time; auto takes layers where "
        "a solver needs them or the model does not fit.",
    )
    activation_memory: int = Field(
        default=8 * 2**30,
        gt=0,
        description="Bytes of hidden states kept in memory between layers; more go to files in RUN.",
    )


class CalibrateSettings(CalibrateOptions):
    """One calibration."""

    run: Folder = Field(description="Folder of the run.")


class _Exported(Settings):
    """What is exported: in a class of its own so that it comes first, also in help."""

    run: Folder = Field(description="Folder of the run.")
    out: Folder = Field(description="Folder of the checkpoint to make.")
    recipe: OptionalPlace = Field(
        default=None, description="modelopt's name of a recipe; without it, the one given to calibrate."
    )
    model: OptionalPlace = Field(
        default=None, description="Where the model is now, if it has moved since calibrate."
    )


class ExportOptions(Settings):
    """How an export decides and writes. The policies `unseen`, `conflict`, `dead` and `expert_input_scale`
    are those of stages/unify.py.
    """

    unseen: UnseenPolicy = Field(
        default="layer",
        description="An expert that no token reached: gets the largest scale of its layer, is stored in a "
        "weight-only format, or is an error.",
    )
    conflict: ConflictPolicy = Field(
        default="max", description="Modules that saw one tensor and disagree about it: take the max, or stop."
    )
    dead: DeadPolicy = Field(
        default="floor", description="An input that was always zero: gets a smallest scale, or is an error."
    )
    expert_input_scale: ExpertInputScale = Field(
        default="layer",
        description="Input scales of fused experts: one per layer, as engines expect, or one per expert.",
    )
    fold: Fold = Field(
        default="auto",
        description="Input scales that AWQ found: folded into the weights before, so that engines load a "
        "plain checkpoint, or kept apart as pre_quant_scale where modelopt keeps them apart.",
    )
    scales: ScaleChoice | None = Field(
        default=None,
        description="Block scales of NVFP4 weights: from each block's largest weight (max), the one of least "
        "squared error (mse), or with the largest weight on 6 or 4 (four_over_six). Without it, as the "
        "recipe says.",
    )
    mxfp4_scale: Mxfp4Scale = Field(
        default="max",
        description="Weights that the source holds in MXFP4 and the recipe puts into NVFP4: new scales by "
        "max, or the source's powers of two, under which all values that fit them come out the same.",
    )
    target: Target = Field(
        default="any",
        description="Engine that has to load it: what that one does not load is refused before anything is "
        "written.",
    )
    overwrite: bool = Field(
        default=False, description="Replace another export that is at OUT; files that are not its own stay."
    )
    trust_remote_code: bool = Field(default=False, description="Run Python code that comes with the model.")
    shard_size: int = Field(default=5_000_000_000, gt=0, description="Bytes per shard.")
    dry_run: bool = Field(
        default=False,
        description="Say what would be written, which policies would act, and the disk and memory it takes; "
        "write nothing to OUT.",
    )


class ExportSettings(ExportOptions, _Exported):
    """One export."""

    partial: bool = Field(
        default=False, description="Export an unfinished run; the checkpoint's report says so."
    )


class QuantizeSettings(ExportOptions, CalibrateOptions):
    """A calibration and an export of what it measured. An option that both have holds for both."""

    out: Folder = Field(description="Folder of the checkpoint to make.")
    run: OptionalFolder = Field(
        default=None, description="Folder of the run, which stays; without it, OUT-run beside OUT."
    )
    recipe: Place = Field(
        default="nvfp4",
        description="modelopt's name of a recipe; AWQ and GPTQ are solved while calibrating.",
    )
    stop_after: OptionalDuration = Field(
        default=None,
        description="Stop after this time, such as 3h55m, as if a signal had come; exit code 75. Calibrating "
        "commits first.",
    )
    dry_run: bool = Field(
        default=False,
        description="Of a run that is finished: say what would be written, which policies would act, and the "
        "disk and memory it takes; write nothing.",
    )

    @property
    def run_folder(self) -> Path:
        """The run's folder, also where none is named."""
        return self.run or self.out.with_name(f"{self.out.name}-run")

    @property
    def calibration(self) -> CalibrateSettings:
        """The first stage's part."""
        given = {name: getattr(self, name) for name in CalibrateSettings.model_fields}
        return CalibrateSettings(**given | {"run": self.run_folder})

    @property
    def export(self) -> ExportSettings:
        """The second stage's part."""
        given = {name: getattr(self, name) for name in (*ExportOptions.model_fields, "out", "recipe")}
        return ExportSettings(**given, run=self.run_folder)


class VerifySettings(Settings):
    """One verification."""

    out: Folder = Field(description="Folder of the checkpoint, whoever wrote it.")
    target: Target = Field(
        default="any",
        description="Engine that has to load it; any: every engine that takes its formats has to read it "
        "rightly.",
    )
    model: OptionalPlace = Field(
        default=None,
        description="The model it was made from, a folder or hub id: every tensor is compared with it.",
    )
    revision: str | None = Field(default=None, description="Branch, tag or commit of MODEL on the hub.")
    numeric: bool = Field(
        default=False,
        description="Run the checkpoint and MODEL on DATA, one decoder layer at a time, inputs rounded as "
        "engines round them: loss, KL, agreement, errors by layer.",
    )
    data: OptionalPlace = Field(
        default=None, description="Text that calibration has not seen, in any form that calibrate takes."
    )
    samples: int = Field(default=32, gt=0, description="Windows of DATA.")
    seq: int = Field(default=512, gt=1, description="Tokens per window.")
    batch: int = Field(default=4, gt=0, description="Windows per forward.")
    device: str = Field(default="auto", description="Where --numeric computes: auto, cpu, cuda or cuda:N.")
    max_loss_increase: float | None = Field(
        default=None,
        description="Nats per token that the checkpoint may cost beside MODEL; more is a finding.",
    )
    trust_remote_code: bool = Field(default=False, description="Run Python code that comes with the model.")
