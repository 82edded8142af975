"""What transformers and modelopt say about a model and a recipe, as plain data that outlives both imports."""

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from stages.model.cast_source import dtype_asked
from stages.model.matrices import StoredMatrix
from stages.model.text_model import TextModel
from stages.model.weights import TORCH_DTYPES
from stages.recipe.quantizer_plan import QuantizerPlan
from stages.recipe.solvers import solver_of
from state.identity import flatten
from state.source import Source

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from stages.model.skeleton import Skeleton

Scales = Literal["plain", "folded", "separate"]
"""Where a solver's input scales are: there is no solver, within the weights, or in tensors of their own."""


@dataclass(frozen=True)
class ModelPlan:
    """A recipe's plan for a model.

    matrices: quantized module → where its weight lies. dtype: torch's name of what the model computes in.
    config: the model's configuration, flattened as in a run's identity. files: the checkpoint's configuration
    files, name → text, by where a solver's scales are.
    """

    quantizers: QuantizerPlan
    matrices: dict[str, StoredMatrix]
    dtype: str
    text: TextModel
    config: dict[str, str]
    files: dict[Scales, dict[str, str]]


def make_plan(folder: Path, source: Source, recipe_name: str, trust_remote_code: bool = False) -> ModelPlan:
    """Ask transformers and modelopt about the model in a folder.

    Raises InputError where either can't be served: see `load_config`, `Skeleton`, `plan_quantizers`.
    """
    from stages.model.plausible import require_possible_counts, require_possible_sizes
    from stages.model.skeleton import Skeleton, load_config, refuse_other_weights
    from stages.recipe.quantizers import plan_quantizers
    from stages.recipe.recipes import resolve

    require_possible_counts(folder, source.tensors)
    config = load_config(folder, trust_remote_code, dtype_asked(source))
    refuse_other_weights(config, folder)
    skeleton = Skeleton(config, source.tensors, trust_remote_code)
    require_possible_sizes(folder, skeleton.model, skeleton.parameter_of, source.tensors)
    return describe(skeleton, config, source, plan_quantizers(skeleton, resolve(recipe_name)))


def describe(
    skeleton: "Skeleton", config: "PretrainedConfig", source: Source, quantizers: QuantizerPlan
) -> ModelPlan:
    """The plan of a model whose skeleton and quantizers are there already."""
    from stages.recipe.excluded import with_all_excluded
    from stages.recipe.hf_config import config_files, with_pre_quant_scale

    dtype, solver = stated_dtype(skeleton, source), solver_of(quantizers)
    matrices = {module: skeleton.matrix(module) for module in quantizers.weights}
    plain = with_all_excluded(
        quantizers.hf_quant_config,
        source.tensors,
        {module: matrix.tensor for module, matrix in matrices.items()},
        skeleton.embeddings,
        skeleton.expert_tensors,
        quantizers.left_out,
    )
    quantizers = replace(quantizers, hf_quant_config=plain)
    variants: dict[Scales, dict[str, object]] = {"plain": plain}
    if solver is not None and solver.needs_pass:
        variants["folded"] = with_pre_quant_scale(plain, separate=False)
        variants["separate"] = with_pre_quant_scale(plain, separate=True)
    return ModelPlan(
        quantizers=quantizers,
        matrices=matrices,
        dtype=dtype,
        text=TextModel.of(skeleton.config),
        config=flattened(config),
        files={
            where: config_files(source.folder, stated, dtype_asked(source))
            for where, stated in variants.items()
        },
    )


def flattened(config: "PretrainedConfig") -> dict[str, str]:
    """A configuration as a run's identity holds it."""
    return flatten(json.loads(config.to_json_string(use_diff=False)))


def stated_dtype(skeleton: "Skeleton", source: Source) -> str:
    """What the model computes in: its configuration's dtype, or else that of the first float tensor."""
    stated = skeleton.config.dtype
    if stated is None:
        floats = (TORCH_DTYPES[e.dtype] for e in source.tensors.values() if e.dtype in TORCH_DTYPES)
        stated = next(floats, "bfloat16")
    return str(stated).removeprefix("torch.")
