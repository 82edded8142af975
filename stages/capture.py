"""The rescue: a model that modelopt calibrated, still in memory, becomes a run that can be exported again and
again.

    import holdfast
    holdfast.capture(model, source="path/to/the/unquantized/model", run="runs/rescued", recipe="nvfp4")

Whatever modelopt's exporter refuses afterwards (`Only support scalar input quant amax`), the calibration is
no longer lost with the process. Reads modelopt's quantizer attributes; checked against modelopt 0.47.
"""

from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from stages.calibrate.identify import environment, identify
from stages.calibrate.observe.arrays import quantizer_sites
from stages.calibrate.observe.relations import probe, relations
from stages.model.dequantize.source import open_source
from stages.model.folder import locate
from stages.model.plausible import require_possible_counts
from stages.model.skeleton import Skeleton, load_config, refuse_other_weights
from stages.model.weights import largest_magnitude
from stages.progress import Progress, Silent
from stages.recipe.quantizers import plan_quantizers
from stages.recipe.recipes import resolve
from state.claim import create_run
from state.errors import InputError
from state.head import Cursor
from state.home import expand_home
from state.layout import Layout, arrange
from state.names import Role, Site
from state.record import RunRecord, SourceDescription
from state.update import Generation, Update

STATISTICS_OF: dict[Role, tuple[str, ...]] = {
    "input": ("amax",),
    "k": ("amax",),
    "v": ("amax",),
    "weight": ("weight_amax",),
}
NO_TOKENS = np.empty((0, 1), dtype=np.int32)


def capture(
    model: nn.Module, source: str, run: Path | str, recipe: str, progress: Progress | None = None
) -> Path:
    """Write the input, K and V amax of a calibrated modelopt model to a new, finished run.

    Args:
        model: as `mtq.quantize` returned it; its quantizers' amax may be scalars or one value per channel, of
        any shape. source: the unquantized model it was made from, a folder or hub id: export reads the
        weights from there. recipe: what `holdfast export` uses unless told otherwise.
    Raises InputError when the run exists, no quantizer was calibrated, or an amax was measured behind a
    smoothing scale that can't be taken out again.
    """
    progress, run = progress or Silent(), expand_home(run)
    folder = locate(source, None, progress)
    tensors = open_source(folder)
    require_possible_counts(folder, tensors.tensors)
    config = load_config(folder)
    refuse_other_weights(config, folder)
    skeleton = Skeleton(config, tensors.tensors)
    plan_quantizers(skeleton, resolve(recipe))
    found = probe(skeleton, skeleton.model)
    values = _amax_of_sites(model, quantizer_sites(skeleton, found))
    if not values:
        raise InputError(
            "no input quantizer of this model holds an amax; calibrate it with mtq.quantize first"
        )
    for module in skeleton.projections():
        matrix = skeleton.matrix(module)
        if matrix.tensor in tensors.tensors:  # a tied output head has no tensor of its own
            weight = matrix.read(tensors)
            values[Site(module, "weight")] = largest_magnitude(weight.flatten()).numpy()
    widths = {site: value.shape[0] if value.ndim else None for site, value in values.items()}
    layout = Layout(arrays=arrange(widths, STATISTICS_OF), relations=relations(skeleton, found))
    record = RunRecord(
        settings={"recipe": recipe, "model": source, "captured": True},
        identity=identify(folder, tensors, config, skeleton, NO_TOKENS, progress),
        environment=environment(skeleton, torch.device("cpu"), "captured", 0),
        source=SourceDescription(model=source),
        generator={"holdfast": version("holdfast"), "modelopt": version("nvidia-modelopt")},
    )
    with create_run(run, record, NO_TOKENS) as writer:
        writer.commit(Update(Cursor(), True, Generation(layout, _arrays(layout, values))))
    return run


def _amax_of_sites(model: nn.Module, sites: dict[str, list[Site]]) -> dict[Site, NDArray[np.float32]]:
    """Site → amax, [] or [channels], of every calibrated quantizer that stands for activations."""
    values: dict[Site, NDArray[np.float32]] = {}
    for name, module in model.named_modules():
        if name in sites and getattr(module, "_amax", None) is not None:
            amax = _raw_amax(name, module)
            values |= dict.fromkeys(sites[name], amax)
    return values


def _raw_amax(name: str, quantizer: nn.Module) -> NDArray[np.float32]:
    """The amax of what the module is given, before any smoothing scale, without axes of length one."""
    amax: torch.Tensor = quantizer.get_buffer("_amax").detach().float().cpu().squeeze()
    smoothing = getattr(quantizer, "_pre_quant_scale", None)
    if smoothing is not None:
        measured = getattr(quantizer, "_amax_for_smoothing", None)
        if measured is None and amax.dim() == 0:
            raise InputError(
                f"{name} holds one amax measured behind a pre_quant_scale; what each channel was is lost. "
                "Capture before the smoothing, or calibrate with `holdfast calibrate`"
            )
        scale = smoothing.detach().float().cpu().squeeze()
        amax = measured.float().squeeze() if measured is not None else amax / scale
    array: NDArray[np.float32] = amax.numpy()
    return array


def _arrays(layout: Layout, values: dict[Site, NDArray[np.float32]]) -> dict[str, NDArray[np.generic]]:
    arrays: dict[str, NDArray[np.generic]] = {}
    for array in layout.arrays:
        statistic = array.statistics[0]
        stacked = np.stack([np.asarray(values[site], dtype=np.float32) for site in array.sites()])
        arrays[f"{statistic}/{array.key}"] = stacked.reshape(array.shape(statistic))
    return arrays
