"""Builds the model that a checkpoint's config.json names, without weights."""

import copy

import torch
import transformers
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from state.errors import InputError
from state.reasons import reason


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
    named = (config.architectures or [""])[0]
    found = getattr(transformers, named, None)
    if isinstance(found, type) and issubclass(found, PreTrainedModel):
        model: PreTrainedModel = found._from_config(config)  # type: ignore[attr-defined]
        return model
    # A class of the model's own code, or one that this version of transformers calls otherwise.
    return AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
