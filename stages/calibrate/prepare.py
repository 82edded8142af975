"""Everything that can be known and refused before a weight is loaded, cheapest first."""

from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import PretrainedConfig, PreTrainedModel

from stages.calibrate.by_layers import require_layers
from stages.calibrate.forward.loaded_dtypes import in_float32, kept_wide
from stages.calibrate.forward.whole_model import load_tokenizer, pick_device
from stages.calibrate.identify import environment, identify
from stages.calibrate.observe.layer_parts import layer_parts
from stages.calibrate.observe.relations import Probe, probe, relations
from stages.calibrate.scalable import nothing_to_scale
from stages.calibrate.text.files import DataUnreachable
from stages.calibrate.text.tokens import token_matrix
from stages.calibrate.tunable import require_room
from stages.model.cast_source import dtype_asked, require_held_by_dtype, told_of_cast
from stages.model.dequantize.source import open_source, told_of_quantized
from stages.model.folder import locate
from stages.model.plausible import require_possible_counts, require_possible_sizes
from stages.model.skeleton import Skeleton, load_config, refuse_other_weights
from stages.progress import Progress
from stages.recipe.exportable import require_exportable
from stages.recipe.quantizer_plan import CASTS, QuantizerPlan, told_left_out
from stages.recipe.quantizers import plan_quantizers
from stages.recipe.recipes import resolve
from stages.recipe.solvers import Solver, solver_of
from stages.settings import CalibrateSettings
from state.errors import Difference, HoldfastError, IdentityMismatch, InputError
from state.identity import Environment, Identity, require_same, unrecorded
from state.reader import open_run
from state.reasons import reason
from state.source import Source
from state.store import RunWriter

DECIDE_WINDOWS = ("split", "column", "take", "samples", "seq")


@dataclass(frozen=True)
class Prepared:
    """What a calibration works from. probe: None where it needs loaded weights. solver: None where the recipe
    asks for none, or for one that needs no pass.
    """

    folder: Path
    config: PretrainedConfig
    source: Source
    skeleton: Skeleton
    probe: Probe | None
    quantizers: QuantizerPlan
    solver: Solver | None
    tokens: NDArray[np.int32]
    device: torch.device
    identity: Identity
    environment: Environment

    @property
    def circumstances(self) -> dict[str, str | int]:
        """What hidden states are made from and under, by name."""
        windows, seq = self.tokens.shape
        made_from = {"identity": self.identity.digest, "windows": windows, "seq": seq}
        return made_from | self.environment.model_dump(mode="json")


def prepare(settings: CalibrateSettings, writer: RunWriter | None, progress: Progress) -> Prepared:
    """Check everything that can be checked without loading weights, cheapest first."""
    progress.stage("planning")
    recipe = resolve(settings.recipe)
    device = pick_device(settings.device)
    folder = locate(settings.model, settings.revision, progress)
    source = open_source(folder, settings.dtype)
    for note in told_of_quantized(source) + told_of_cast(source):
        progress.note(note)
    require_possible_counts(folder, source.tensors)
    config = load_config(folder, settings.trust_remote_code, dtype_asked(source))
    refuse_other_weights(config, folder)
    skeleton = Skeleton(config, source.tensors, settings.trust_remote_code)
    require_possible_sizes(folder, skeleton.model, skeleton.parameter_of, source.tensors)
    quantizers = plan_quantizers(skeleton, recipe)
    solver = solver_of(quantizers)
    solver = solver if solver is not None and solver.needs_pass else None
    matrices = {module: skeleton.matrix(module) for module in quantizers.weights}
    require_exportable(quantizers, matrices, source.tensors)
    if solver is not None:
        shapes = {module: matrix.shape(source.tensors) for module, matrix in matrices.items()}
        require_room(solver, recipe.name, shapes, device)
    found = _probe_on_meta(skeleton)
    require_layers(settings, skeleton, source, solver, found is not None)
    if found is not None:
        _require_keys_and_values(quantizers, found)
        _require_computable(skeleton)
    for left_out in told_left_out(quantizers.left_out):
        progress.note(left_out)
    require_held_by_dtype(source)
    if solver is not None and found is not None:
        parts = layer_parts(skeleton, found, relations(skeleton, found), source.tensors)
        if warning := nothing_to_scale(solver, settings.recipe, parts.values(), quantizers.weights):
            progress.warn(warning)
    tokens = _tokens(settings, folder, writer, progress)
    _refuse_unknown(tokens, skeleton, folder)
    identity = identify(folder, source, config, skeleton, tokens, progress)
    here = environment(skeleton, device, settings.experts, settings.batch)
    if writer is not None:
        require_same(
            writer.record.identity,
            identity,
            f"{settings.run} was calibrated from other content",
            "give another RUN to calibrate this, or the model, data and sizes of that run to go on with it",
        )
        _check_environment(settings, writer, here, progress)
    return Prepared(
        folder=folder,
        config=config,
        source=source,
        skeleton=skeleton,
        probe=found,
        quantizers=quantizers,
        solver=solver,
        tokens=tokens,
        device=device,
        identity=identity,
        environment=here,
    )


def _require_keys_and_values(quantizers: QuantizerPlan, found: Probe) -> None:
    """Raise InputError where the recipe needs K or V of an attention that can't be observed."""
    unseen = [
        attention
        for attention, cache in quantizers.kv.items()
        if cache not in CASTS and attention not in found.kv_channels
    ]
    if unseen:
        raise InputError(
            f"recipe {quantizers.recipe.name!r} quantizes the KV cache of {unseen[0]}, which computes "
            "attention outside transformers' attention registry, where K and V can't be observed "
            f"({len(unseen)} such); choose a recipe that leaves KV caches alone, such as nvfp4"
        )


def _require_computable(skeleton: Skeleton) -> None:
    """Raise InputError where the class can't compute with the dtypes that it keeps its weights in. The model
    without weights, all in one dtype, was probed before.
    """
    model = skeleton.model
    wide = kept_wide(model)
    if not wide:
        return
    with in_float32(wide):
        try:
            _probe_without_weights(skeleton)
        except HoldfastError:
            raise
        except Exception as error:  # the model's own code
            dtype = str(model.dtype).removeprefix("torch.")
            raise InputError(
                f"{type(model).__name__} of transformers {version('transformers')} can't compute in {dtype} "
                f"beside the weights that it keeps in float32 ({reason(error)}); give --dtype float32, or "
                "take another release of transformers"
            ) from error


def _tokens(
    settings: CalibrateSettings, folder: Path, writer: RunWriter | None, progress: Progress
) -> NDArray[np.int32]:
    try:
        return token_matrix(
            load_tokenizer(folder, settings.trust_remote_code),
            settings.data,
            samples=settings.samples,
            seq=settings.seq,
            split=settings.split,
            column=settings.column,
            take=settings.take,
            progress=progress,
        )
    except DataUnreachable:
        if writer is None:
            raise
        _require_same_windows(settings, writer)
        progress.note(
            f"DATA {settings.data} can't be reached; going on with the tokens stored in {settings.run}"
        )
        return open_run(settings.run).tokens


def _require_same_windows(settings: CalibrateSettings, writer: RunWriter) -> None:
    """Windows that can't be made again are those asked for as long as what decides about them is the same."""
    recorded, asked = writer.record.settings, settings.model_dump(mode="json")
    found = [
        Difference(name, str(stored), str(asked[name]))
        for name in DECIDE_WINDOWS
        if (stored := recorded.get(name, CalibrateSettings.model_fields[name].default)) != asked[name]
    ]
    if found:
        lines = "\n".join(f"  {difference}" for difference in found)
        raise IdentityMismatch(
            f"DATA {settings.data} can't be reached, and {settings.run} holds other windows than are asked "
            f"for:\n{lines}\ngive the settings of that run, or DATA that can be read and another RUN",
            found,
        )


def _refuse_unknown(tokens: NDArray[np.int32], skeleton: Skeleton, folder: Path) -> None:
    embeddings = skeleton.model.get_input_embeddings()
    known, largest = embeddings.weight.shape[0], int(tokens.max())
    if largest >= known:
        name = next(name for name, module in skeleton.model.named_modules() if module is embeddings)
        raise InputError(
            f"the tokenizer in {folder} makes token {largest}, and {skeleton.hub_name(name)} knows {known} "
            "tokens. Is the tokenizer the model's own?"
        )


def _check_environment(
    settings: CalibrateSettings, writer: RunWriter, here: Environment, progress: Progress
) -> None:
    if writer.head.finished:
        return
    if unknown := unrecorded(writer.record.environment, here):
        progress.note(
            f"{settings.run} was begun by an older Holdfast, which did not record {' and '.join(unknown)}: "
            "whether they are the same can't be told"
        )
    try:
        require_same(
            writer.record.environment,
            here,
            f"{settings.run} was begun in another environment",
            "go on there, or here with --accept-environment, which ends the promise of byte-identical "
            "statistics for this run",
        )
    except IdentityMismatch:
        if not settings.accept_environment:
            raise
        progress.warn("going on in another environment than the run began in, as asked; this is recorded")
        writer.accept_environment(here)


def _probe_on_meta(skeleton: Skeleton) -> Probe | None:
    """None for models whose forward needs real values, such as experts as separate linears: they are probed
    once loaded.
    """
    try:
        return _probe_without_weights(skeleton)
    except HoldfastError:
        raise
    except Exception:  # the model's own code; what is wrong with it shows when it is probed again
        return None


def _probe_without_weights(skeleton: Skeleton) -> Probe:
    """Some models ask for values to build a mask from, others for a mask."""
    try:
        return probe(skeleton, skeleton.model)
    except HoldfastError:
        raise
    except Exception:
        return probe(skeleton, skeleton.model, masks_on_meta=True)


def probe_loaded(work: Prepared, model: PreTrainedModel) -> Probe:
    """The probe of a loaded model. Raises InputError where its forward fails."""
    try:
        if work.probe is not None:
            return work.probe
        found = probe(work.skeleton, model)
    except HoldfastError:
        raise
    except Exception as error:  # the model's own code, with the numbers of its configuration
        raise InputError(
            f"{work.folder}: the model can't compute with what its config.json says: {reason(error)}"
        ) from error
    _require_keys_and_values(work.quantizers, found)
    return found
