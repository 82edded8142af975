"""A checkpoint's predictions beside its source's, with inputs rounded as engines round them."""

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from torch import Tensor, nn

from stages.calibrate.forward.buffers import Limits
from stages.calibrate.forward.logits import LayerwiseLogits
from stages.calibrate.forward.whole_model import load_tokenizer, pick_device
from stages.calibrate.text.tokens import token_matrix
from stages.engines.algos import AWQ_SCALE
from stages.engines.files import read_files
from stages.engines.kv import attention_of
from stages.engines.modules import Inventory, take_stock
from stages.measure.beside import Beside, compare
from stages.measure.presented import PresentedCheckpoint, present, require_whole
from stages.measure.rounding import Round, Rounded, rounding
from stages.model.dequantize.source import open_source
from stages.model.folder import locate
from stages.model.skeleton import Skeleton, load_config
from stages.model.weights import map_tensor
from stages.progress import Progress
from stages.settings import VerifySettings
from stages.verify.likeness import Likeness
from stages.verify.numbers import Numbers
from stages.verify.run import require_text
from state.errors import InputError
from state.names import split_name
from state.source import Source

HIDDEN_MEMORY = 4 * 2**30
"""Bytes of hidden states between two layers that are kept in memory, of each model."""

WORST = 10


def measure(settings: VerifySettings, progress: Progress) -> Numbers:
    """Run both models on text of `settings.data`.

    Raises:
        InputError: MODEL or DATA is not given, or the model can't be run layer by layer, or the checkpoint
            lacks tensors that it needs.
    """
    require_text(settings)
    assert settings.model is not None and settings.data is not None
    folder = locate(settings.model, settings.revision, progress)
    source = open_source(folder)
    config = load_config(folder, settings.trust_remote_code)
    skeleton = Skeleton(config, source.tensors, settings.trust_remote_code)
    files = read_files(settings.out)
    if files.source is None or files.stated is None:
        raise InputError(
            f"{settings.out} can't be read, so that nothing can be measured: {files.findings[0]}"
        )
    inventory = take_stock(files.source.tensors, files.stated, skeleton.embeddings)
    presented = present(files.source, inventory, source, skeleton)
    require_whole(presented, skeleton)
    windows = token_matrix(
        load_tokenizer(folder, settings.trust_remote_code),
        settings.data,
        samples=settings.samples,
        seq=settings.seq,
        progress=progress,
    )
    other = Skeleton(config, presented.tensors, settings.trust_remote_code)
    simulated = Simulated(files.source, inventory, other)
    tokens = torch.from_numpy(windows.astype(np.int64))
    found = _in_step(settings, (skeleton, source), (other, presented), tokens, simulated, progress)
    base, loss = (torch.cat(losses) for losses in found.predictions.losses)
    difference = loss - base
    return Numbers(
        windows=len(windows),
        tokens=found.predictions.tokens,
        loss=loss.mean().item(),
        source_loss=base.mean().item(),
        error=difference.std(correction=0).item() / len(difference) ** 0.5,
        kl=torch.cat(found.predictions.distances).mean().item(),
        agreement=found.predictions.agreeing / found.predictions.tokens,
        layers=found.layers,
        worst=_worst(presented, source),
        left_out=simulated.left_out(),
    )


def _in_step(
    settings: VerifySettings,
    base: tuple[Skeleton, Source],
    other: tuple[Skeleton, Source],
    tokens: Tensor,
    simulated: "Simulated",
    progress: Progress,
) -> Beside:
    device = pick_device(settings.device)
    for skeleton, _ in (base, other):
        if skeleton.model._can_set_experts_implementation():
            skeleton.model.set_experts_implementation("grouped_mm")
    batches = list(tokens.to(device).split(settings.batch))
    limits = Limits(0, HIDDEN_MEMORY)
    with TemporaryDirectory() as scratch:
        one, two = (
            LayerwiseLogits(
                *pair,
                tokens,
                settings.batch,
                device,
                Path(scratch) / name,
                limits,
                lambda _layer, _batch: progress.advance(1),
            )
            for name, pair in (("source", base), ("checkpoint", other))
        )
        layers = len(one.decoder.layers)
        progress.start("measuring", total=2 * layers * len(batches), unit="batches")
        with one, two:
            found = compare(one, two, batches, simulated.around)
        progress.finish()
    return found


class Simulated:
    """What is rounded while a layer of the checkpoint runs."""

    def __init__(self, checkpoint: Source, inventory: Inventory, skeleton: Skeleton) -> None:
        self._skeleton = skeleton
        self._rounds = _by_parameter(checkpoint, inventory, skeleton)
        self._kv = _kv_scales(checkpoint, inventory)
        self._done: list[Rounded] = []

    def around(self, layer: int, _module: nn.Module) -> AbstractContextManager[object]:
        """The rounding of a layer whose weights are loaded."""
        weights = {
            parameter.untyped_storage().data_ptr(): self._rounds[name]
            for name, parameter in self._skeleton.model.named_parameters()
            if name in self._rounds and not parameter.is_meta
        }
        keys, values = self._kv.get(layer, (None, None))
        if not weights and keys is None:
            return nullcontext()
        self._done.append(Rounded(weights, keys, values))
        return self._done[-1]

    def left_out(self) -> tuple[str, ...]:
        """For people."""
        found = []
        if any(name.rpartition(".")[0].endswith("lm_head") for name in self._rounds):
            found.append("the input of lm_head is not rounded")
        if unreached := sum(done.unreached for done in self._done):
            found.append(
                f"inputs of {unreached:,} weights are not rounded: nobody was seen to multiply with them"
            )
        if unattended := sum(done.unattended for done in self._done):
            found.append(
                f"KV caches of {unattended:,} layers are not rounded: their attention is not torch's own"
            )
        return tuple(found)


def _by_parameter(checkpoint: Source, inventory: Inventory, skeleton: Skeleton) -> dict[str, Round]:
    """Parameter of the class → how what is multiplied with it is rounded. Engines take the largest input
    scale of those that share one matrix.
    """
    scales: dict[str, list[tuple[str, Tensor | None, Tensor | None]]] = {}
    for module in inventory.quantized.values():
        tensor = module.name if module.together else skeleton.matrix(module.name).tensor
        parameter, _ = skeleton.parameter_of[tensor]
        leaves = {
            leaf: map_tensor(checkpoint, entry.name).float()
            for leaf, entry in module.tensors.items()
            if leaf in ("input_scale", AWQ_SCALE)
        }
        if module.algo is not None:
            found = (module.algo.name, leaves.get("input_scale"), leaves.get(AWQ_SCALE))
            scales.setdefault(parameter, []).append(found)
    rounds = {}
    for parameter, members in scales.items():
        algo, _, before = members[0]
        held = [scale.reshape(()) for _, scale, _ in members if scale is not None]
        done = rounding(algo, torch.stack(held).max() if held else None, before)
        if done is not None:
            rounds[parameter] = done
    return rounds


def _kv_scales(checkpoint: Source, inventory: Inventory) -> Mapping[int, tuple[Tensor, Tensor]]:
    """Layer → scales of its K and V."""
    found: dict[int, dict[str, Tensor]] = {}
    for name in inventory.kv:
        attention = attention_of(name)
        layer = None if attention is None else split_name(attention)[1]
        if layer is not None:
            scale = map_tensor(checkpoint, name).float().reshape(())
            found.setdefault(layer, {})[name.rpartition(".")[2]] = scale
    return {
        layer: (scales["k_scale"], scales["v_scale"])
        for layer, scales in found.items()
        if scales.keys() == {"k_scale", "v_scale"}
    }


def _worst(presented: PresentedCheckpoint, source: Source) -> dict[str, float]:
    """The modules whose weights are furthest from the source's, scaled columns scaled back."""
    errors: dict[str, float] = {}
    for tensor, modules in presented.made.items():
        ours, theirs = presented.value(tensor), map_tensor(source, tensor)
        for name, (_, matrix) in modules.items():
            mine, its = matrix.place(ours).float(), matrix.place(theirs).float()
            likeness = Likeness.of(its.shape[1])
            likeness.add(mine, its)
            errors[name] = min(likeness.error, likeness.column_error)
    worst = sorted(errors, key=lambda name: (-errors[name], name))[:WORST]
    return {name: errors[name] for name in worst}
