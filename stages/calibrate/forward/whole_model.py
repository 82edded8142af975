"""Loads the model whole, onto one device, and refuses what transformers would let pass in silence."""

import copy
import json
from pathlib import Path

import torch
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from stages.model.own_code import refuse_own_code
from stages.model.plausible import require_possible_ids
from stages.model.skeleton import Skeleton
from stages.model.weights import read_tensor
from stages.recipe.model_plan import stated_dtype
from state.errors import InputError
from state.reasons import reason
from state.source import Source

PROCESSOR_TEMPLATE = "chat_template.json"
"""Where multimodal models keep the chat template that they have in common for text and images."""


def pick_device(name: str) -> torch.device:
    """`auto`: the first GPU, or the CPU where there is none. Raises InputError for a device this machine
    lacks.
    """
    if name == "auto":
        return torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise InputError(f"DEVICE {name!r} can't be used: {_unusable(name, error)}") from error
    return device


def _unusable(name: str, error: Exception) -> str:
    """Why a device can't be used, in torch's first sentence, and those that can."""
    reason = str(error).splitlines()[0].partition(". ")[0]
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if name.startswith("cuda") and not gpus:
        reason = f"torch finds no GPU here ({reason})"
    usable = [f"cuda:{number}" for number in range(gpus)] + ["cpu"]
    return f"{reason}; use DEVICE={', DEVICE='.join(usable)} or DEVICE=auto"


def load_model(skeleton: Skeleton, source: Source, device: torch.device, experts: str) -> PreTrainedModel:
    """The model of a skeleton in its stored dtype, in evaluation mode, with the tensors of `source`: each is
    read from the file that was digested, and is what the digest was of.

    experts: transformers' implementation for fused experts, where the model has a choice (`grouped_mm` or
    `eager`).

    Raises:
        InputError: a tensor is missing or has another shape than the configuration says, or memory runs out.
        IdentityMismatch: a file changed since it was digested.
    """
    folder = source.folder
    # A class that is handed its tensors opens no file of its own accord.
    tensors = {name: _Stored(source, name) for name in source.tensors}
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        model, info = type(skeleton.model).from_pretrained(
            None,
            config=copy.deepcopy(skeleton.model.config),
            state_dict=tensors,
            dtype=getattr(torch, stated_dtype(skeleton, source)),
            output_loading_info=True,
        )
    except (RuntimeError, ValueError, OSError) as error:
        raise InputError(f"{folder} can't be loaded: {reason(error)}") from error
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
    source.require_unchanged()
    if missing := sorted(info["missing_keys"]):
        raise InputError(
            f"{folder} lacks {len(missing)} tensors its config.json asks for, such as {missing[0]}; "
            "transformers would have made them up"
        )
    if model._can_set_experts_implementation():
        model.set_experts_implementation(experts)
    try:
        return model.eval().to(device)
    except torch.OutOfMemoryError as error:
        raise InputError(
            f"{folder} does not fit on {device}: {str(error).splitlines()[0]}; try DEVICE=cpu"
        ) from error


class _Stored:
    """A tensor that is read when transformers takes it, so that no more of them are held than are needed."""

    def __init__(self, source: Source, name: str) -> None:
        self._source, self._name = source, name

    def __getitem__(self, index: object) -> torch.Tensor:
        return read_tensor(self._source, self._name)


def load_tokenizer(folder: Path, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """The model's tokenizer, with the chat template of its processor where it has none of its own.

    Raises InputError where the folder holds none that works.
    """
    require_possible_ids(folder)
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
        processor = folder / PROCESSOR_TEMPLATE
        if not getattr(tokenizer, "chat_template", None) and processor.is_file():
            tokenizer.chat_template = json.loads(processor.read_text(encoding="utf-8"))["chat_template"]
        return tokenizer
    except Exception as error:  # tokenizers raises bare Exception for a malformed tokenizer.json
        refuse_own_code(folder, error)
        raise InputError(f"the tokenizer in {folder} can't be loaded: {reason(error)}") from error
