"""Loads the model whole, onto one device, and refuses what transformers would let pass in silence."""

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from stages.model.plausible import require_possible_ids
from state.errors import InputError
from state.reasons import reason


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


def load_model(
    folder: Path, device: torch.device, experts: str, trust_remote_code: bool = False
) -> PreTrainedModel:
    """The model in its stored dtype, in evaluation mode.

    experts: transformers' implementation for fused experts, where the model has a choice (`grouped_mm` or
    `eager`).
    Raises InputError when a tensor is missing or has another shape than the configuration says, or memory
    runs out.
    """
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        model, info = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype="auto",
            trust_remote_code=trust_remote_code,
            output_loading_info=True,
            use_safetensors=True,
        )
    except (RuntimeError, ValueError, OSError) as error:
        raise InputError(f"{folder} can't be loaded: {reason(error)}") from error
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
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


def load_tokenizer(folder: Path, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """The model's tokenizer. Raises InputError where the folder holds none that works."""
    require_possible_ids(folder)
    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except Exception as error:  # tokenizers raises bare Exception for a malformed tokenizer.json
        raise InputError(f"the tokenizer in {folder} can't be loaded: {reason(error)}") from error
