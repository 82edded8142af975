"""Builds the model that a checkpoint's config.json names, without weights."""

import copy

import torch
import transformers
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    PretrainedConfig,
    PreTrainedModel,
)

from state.errors import InputError
from state.reasons import reason

OWN_CODE = {
    "AutoModelForCausalLM": AutoModelForCausalLM,
    "AutoModelForImageTextToText": AutoModelForImageTextToText,
}
"""Entries of `auto_map` that can name a model's own class, the first that is there counts."""


def build_meta_model(config: PretrainedConfig, trust_remote_code: bool = False) -> PreTrainedModel:
    """The model of `config` on the meta device, in evaluation mode: of the class that `architectures` names,
    so that a checkpoint with towers for images is the whole model that engines load.

    The configuration is copied, since building a model writes to it.

    Raises:
        InputError: transformers has no such class, or it computes no next token, or can't be built.
    """
    config = copy.deepcopy(config)
    try:
        with torch.device("meta"):
            model = _build(config, trust_remote_code)
    except InputError:
        raise
    except Exception as error:  # the class computes with what it finds, and raises what comes of it
        raise InputError(
            f"no causal language model can be built from this config.json: {type(error).__name__}: "
            f"{reason(error)}"
        ) from error
    if model.get_output_embeddings() is None:
        raise InputError(
            f"{type(model).__name__} computes no next token (architectures in config.json); Holdfast "
            "calibrates language models, alone or with towers for images and sound"
        )
    return model.eval()


def _build(config: PretrainedConfig, trust_remote_code: bool) -> PreTrainedModel:
    own = [name for name in OWN_CODE if name in (getattr(config, "auto_map", None) or {})]
    if own and trust_remote_code:
        return OWN_CODE[own[0]].from_config(config, trust_remote_code=True)
    named = (config.architectures or [None])[0]
    if named is None:
        return AutoModelForCausalLM.from_config(config)
    found = getattr(transformers, named, None)
    if isinstance(found, type) and issubclass(found, PreTrainedModel):
        model: PreTrainedModel = found._from_config(config)  # type: ignore[attr-defined]
        return model
    if own:
        raise InputError(
            f"{named} (architectures in config.json) is Python code that comes with the model; look at it, "
            "then allow it with --trust-remote-code"
        )
    if type(config) in MODEL_FOR_CAUSAL_LM_MAPPING:  # a class that a program has registered, or none
        made = AutoModelForCausalLM.from_config(config)
        if type(made).__name__ == named:
            return made
    raise InputError(
        f"transformers {transformers.__version__} has no {named} (architectures in config.json); a newer "
        "release may have it"
    )
