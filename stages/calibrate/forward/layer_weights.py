"""Weights of a meta-device model, one decoder layer at a time, from the source's safetensors.

The conversion from hub tensors to parameters (fused experts, transposed weights, parameters kept in float32)
is transformers' own. The functions that do it are semi-private there and called in this module alone, by the
arguments that their signatures name.
"""

import inspect
from collections import defaultdict
from collections.abc import Container, Iterable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import convert_and_load_state_dict_in_model
from transformers.modeling_utils import LoadStateDictConfig
from transformers.utils import logging as transformers_logging

from stages.model.decoder import Decoder, LayerwiseUnsupported
from stages.model.raw import raw_bytes
from stages.model.weights import map_tensor
from state.source import Source

# Some releases of transformers require a plan for tensor parallelism, others have no such argument.
_NO_TENSOR_PARALLELISM: dict[str, None] = {
    name: None
    for name in inspect.signature(convert_and_load_state_dict_in_model).parameters
    if name == "tp_plan"
}

OUTSIDE = -1
HEAD = -2
Part = int
"""A decoder layer by its number; OUTSIDE: whatever else a text forward needs up to the output head; HEAD:
that, where it has weights of its own.
"""


class Weights:
    """Loads and frees parts of a model built on the meta device.

    `read` may run in another thread while a part that was loaded before computes; `load` and `free` may not.

    Args:
        decoder: the layers of the model.
        parameter_of: hub tensor → (parameter it feeds, its place), as in `Skeleton`.
        source: the checkpoint.
        device: where loaded parts live.

    Raises:
        LayerwiseUnsupported: a weight is in no hub tensor, such as one that layers share.
    """

    def __init__(
        self,
        decoder: Decoder,
        parameter_of: Mapping[str, tuple[str, int]],
        source: Source,
        device: torch.device,
    ) -> None:
        self._model: PreTrainedModel = decoder.model
        self._source = source
        self._device = device
        # Each load overwrites the model's own list with the entries that it used.
        self._mapping = get_model_conversion_mapping(self._model)
        self._dtype = self._model.dtype
        self._parameters = _parts(decoder, self._model.state_dict())
        self._parameters[HEAD] = _own_head(self._model, {parameter for parameter, _ in parameter_of.values()})
        part_of = {name: part for part, names in self._parameters.items() for name in names}
        fed = {parameter for parameter, _ in parameter_of.values()}
        if missing := [name for name in part_of if name not in fed]:
            raise LayerwiseUnsupported(f"no hub tensor fills {', '.join(missing)}")
        self._tensors: dict[Part, list[str]] = {part: [] for part in self._parameters}
        for tensor, (parameter, _) in parameter_of.items():
            if parameter in part_of:
                self._tensors[part_of[parameter]].append(tensor)
        self._empty: dict[str, torch.Tensor] = {}
        self._complete: set[Part] = set()
        self._copies = torch.cuda.Stream(device) if device.type == "cuda" else None

    def nbytes(self, part: Part) -> int:
        """Bytes that the source stores for a part."""
        return sum(self._source.tensors[name].nbytes for name in self._tensors[part])

    def absent(self, part: Part) -> list[str]:
        """Names of what a part has no values of yet; empty where it is loaded."""
        if part in self._complete:
            return []
        names = [name for name in self._parameters[part] if _tensor(self._model, name).is_meta]
        if not names:
            self._complete.add(part)
        return names

    def read(self, part: Part) -> dict[str, torch.Tensor]:
        """The hub tensors of a part as stored, read from the disk on return; none where it is loaded.

        On a GPU they are copies there, complete. In host memory they are private mappings of the checkpoint,
        so that weights which need no conversion take no memory that can't be reclaimed.

        Raises:
            IdentityMismatch: one is not what was digested, where it was (see `Source.digests`).
        """
        if not self.absent(part):
            return {}
        with torch.cuda.stream(self._copies):
            tensors = {name: self._fetch(name) for name in self._in_file_order(part)}
        if self._copies is not None:
            self._copies.synchronize()
        return tensors

    def _in_file_order(self, part: Part) -> list[str]:
        entries = [self._source.tensors[name] for name in self._tensors[part]]
        return [entry.name for entry in sorted(entries, key=lambda entry: (entry.file, entry.start))]

    def _fetch(self, name: str) -> torch.Tensor:
        held = map_tensor(self._source, name)
        if self._copies is not None:
            held = torch.empty_like(held, pin_memory=True).copy_(held)
        # Reading each byte here has the disk waited for in this thread and not in the forward.
        self._source.require_digested(name, raw_bytes(held))
        return held if self._copies is None else held.to(self._device, non_blocking=True)

    def load(self, part: Part, tensors: dict[str, torch.Tensor]) -> None:
        """Give the part its weights from what `read` returned, which is emptied. One that is loaded stays so.

        Raises:
            LayerwiseUnsupported: transformers can't convert them, or they leave a weight empty.
        """
        if not self.absent(part):
            return
        if self._copies is not None:
            for tensor in tensors.values():
                tensor.record_stream(torch.cuda.current_stream(self._device))
        state = self._model.state_dict(keep_vars=True)
        self._empty.update({name: state[name] for name in self._parameters[part] if state[name].is_meta})
        config = LoadStateDictConfig(
            device_map={"": self._device},
            dtype=self._dtype,
            dtype_plan=self._model._get_dtype_plan(self._dtype),
            weight_mapping=self._mapping,
        )
        once = {name: _Once(tensor) for name, tensor in tensors.items()}
        tensors.clear()
        with _no_progress_bar():
            info, _ = convert_and_load_state_dict_in_model(
                self._model, once, config, **_NO_TENSOR_PARALLELISM
            )
        if info.conversion_errors or info.mismatched_keys:
            faults = [*info.conversion_errors, *(str(key) for key, *_ in info.mismatched_keys)]
            raise LayerwiseUnsupported(
                f"transformers can't convert the hub tensors of {', '.join(sorted(faults))}"
            )
        if missing := self.absent(part):
            raise LayerwiseUnsupported(f"the hub tensors leave {', '.join(missing)} empty")

    def free(self, part: Part) -> None:
        """Put a part that `load` filled back on the meta device."""
        for name in self._parameters[part]:
            if name in self._empty:
                _assign(self._model, name, self._empty.pop(name))
                self._complete.discard(part)


class _Once:
    """A tensor that is let go as it is handed over: transformers holds on to its whole input until the end,
    and with it would hold every expert twice, split and fused."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self._tensor: torch.Tensor | None = tensor

    def __getitem__(self, index: object) -> torch.Tensor | None:
        tensor, self._tensor = self._tensor, None
        return tensor


def materialise_buffers(model: PreTrainedModel, device: torch.device) -> None:
    """Compute a meta-device model's buffers (rotary frequencies, embedding scales) as `from_pretrained` does.

    Buffers that the checkpoint stores stay on meta: they come with their layer. A second call changes
    nothing.
    """
    absent = [(name, buffer) for name, buffer in model.named_non_persistent_buffers() if buffer.is_meta]
    for name, buffer in absent:
        _assign(model, name, torch.empty_like(buffer, device=device))
    if absent:
        model.initialize_weights()


def _own_head(model: PreTrainedModel, fed: Container[str]) -> list[str]:
    """Parameters of the output head that the checkpoint stores for it."""
    head = model.get_output_embeddings()
    name = next((name for name, module in model.named_modules() if module is head), None)
    if name is None:
        return []
    return [f"{name}.{leaf}" for leaf in head.state_dict() if f"{name}.{leaf}" in fed]


def _tensor(model: nn.Module, name: str) -> torch.Tensor:
    module, _, leaf = name.rpartition(".")
    tensor: torch.Tensor = getattr(model.get_submodule(module), leaf)
    return tensor


def _assign(model: nn.Module, name: str, value: torch.Tensor) -> None:
    module, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(module), leaf, value)


def _parts(decoder: Decoder, names: Iterable[str]) -> dict[Part, list[str]]:
    """Parameters and stored buffers of each part, by memory name."""
    unused = tuple(name + "." for name in decoder.unused_by_text())
    parts: dict[Part, list[str]] = defaultdict(list)
    for name in names:
        if not name.startswith(unused):
            layer = decoder.layer_of(name)
            parts[OUTSIDE if layer is None else layer].append(name)
    return parts


@contextmanager
def _no_progress_bar() -> Iterator[None]:
    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            transformers_logging.enable_progress_bar()
