"""Plans kept beside a run, so that an export can do without transformers and modelopt, whose import takes
seconds.

A kept plan is a file of `RUN/plans/`, named after the digest of everything the plan was made from: the
recipe's name, the versions of the libraries, config.json, the dtype asked for and the shapes of all tensors.
It is a cache: what is missing, damaged or of another version is made anew. Not kept are plans for recipe
files of a person's own, which may draw on other files, and for models that bring code.
"""

from importlib.metadata import version
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from stages.formats import TABLE
from stages.model.cast_source import dtype_asked
from stages.model.matrices import StoredMatrix
from stages.model.text_model import TextModel
from stages.recipe.model_plan import ModelPlan, Scales
from stages.recipe.quantizer_plan import KvFormat, QuantizerPlan
from stages.recipe.recipes import Recipe, is_shipped
from state.durable import Disk
from state.errors import InputError
from state.identity import digest, digest_json
from state.source import Source

FOLDER = "plans"
LAYOUT = 3
"""Goes up when the content of a kept plan changes."""

PACKAGES = ("holdfast", "nvidia-modelopt", "torch", "transformers")


class _Matrix(BaseModel):
    """A StoredMatrix; what is not stated is as its class has it."""

    model_config = ConfigDict(extra="forbid", strict=True)

    tensor: str
    expert: int | None = None
    transposed: bool = False
    first: int = 0
    stride: int = 1
    count: int | None = None


class _Kept(BaseModel):
    """A plan as JSON. A quant_cfg's keys and tuples come back as text and lists: enough for its digest, and a
    kept plan places no quantizers.
    """

    model_config = ConfigDict(extra="forbid", strict=True)

    recipe: dict[str, Any]
    weights: dict[str, tuple[str, int]]
    matrices: dict[str, _Matrix]
    inputs: dict[str, str]
    constant_inputs: dict[str, float]
    kv: dict[str, KvFormat]
    fused_experts: list[str]
    together: dict[str, str]
    merged: dict[str, str]
    hf_quant_config: dict[str, Any]
    left_out: dict[str, str]
    dtype: str
    text: dict[str, str | int | None]
    config: dict[str, str]
    files: dict[Scales, dict[str, str]]


def kept_plan(run: Path, folder: Path, source: Source, recipe_name: str) -> ModelPlan | None:
    """The plan that a run keeps for a recipe and the model in a folder; None where there is none to use."""
    path = _path(run, folder, source, recipe_name)
    if path is None:
        return None
    try:
        stated, _, content = path.read_bytes().partition(b"\n")
        if stated.decode() != digest(content):
            return None
        return _from_kept(_Kept.model_validate_json(content))
    except (OSError, ValueError, ValidationError, KeyError, TypeError):
        return None


def keep_plan(run: Path, folder: Path, source: Source, recipe_name: str, plan: ModelPlan) -> None:
    """Keep a plan beside a run. A run that can't be written to, a full disk, or a link to elsewhere is left
    as it is.
    """
    path = _path(run, folder, source, recipe_name)
    if path is None or path.is_file() or path.parent.is_symlink():
        return
    content = _to_kept(plan).model_dump_json().encode()  # in the plan's own order, which reports follow
    try:
        Disk().publish(path, digest(content).encode() + b"\n" + content)
    except (OSError, InputError):
        return


def _path(run: Path, folder: Path, source: Source, recipe_name: str) -> Path | None:
    if not is_shipped(recipe_name) or any(folder.glob("*.py")):
        return None
    made_from = {
        "layout": LAYOUT,
        "recipe": recipe_name,
        "versions": {package: version(package) for package in PACKAGES},
        "dtype": dtype_asked(source),
        "config.json": digest((folder / "config.json").read_bytes()),
        "tensors": [(entry.name, entry.dtype, entry.shape) for entry in source.tensors.values()],
    }
    return run / FOLDER / f"{digest_json(made_from).rpartition(':')[2]}.json"


def _to_kept(plan: ModelPlan) -> _Kept:
    quantizers = plan.quantizers
    return _Kept(
        recipe=quantizers.recipe.as_json(),
        weights={module: (weight.name, weight.block_size) for module, weight in quantizers.weights.items()},
        matrices={module: _Matrix(**vars(matrix)) for module, matrix in plan.matrices.items()},
        inputs=quantizers.inputs,
        constant_inputs=quantizers.constant_inputs,
        kv=quantizers.kv,
        fused_experts=sorted(quantizers.fused_experts),
        together=quantizers.together,
        merged=quantizers.merged,
        hf_quant_config=quantizers.hf_quant_config,
        left_out=quantizers.left_out,
        dtype=plan.dtype,
        text=vars(plan.text),
        config=plan.config,
        files=plan.files,
    )


def _from_kept(kept: _Kept) -> ModelPlan:
    quantizers = QuantizerPlan(
        recipe=Recipe(**kept.recipe),
        weights={module: TABLE[name].with_blocks(block) for module, (name, block) in kept.weights.items()},
        inputs=kept.inputs,
        constant_inputs=kept.constant_inputs,
        kv=kept.kv,
        fused_experts=frozenset(kept.fused_experts),
        together=kept.together,
        merged=kept.merged,
        hf_quant_config=kept.hf_quant_config,
        left_out=kept.left_out,
    )
    matrices = {module: StoredMatrix(**vars(matrix)) for module, matrix in kept.matrices.items()}
    text = TextModel(**kept.text)  # type: ignore[arg-type]
    return ModelPlan(quantizers, matrices, kept.dtype, text, kept.config, kept.files)
