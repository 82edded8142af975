"""What a calibration is made from, and in which environment: the two descriptions that decide whether work
can be reused.
"""

import os
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import PretrainedConfig

from stages.model.folder import tokenizer_digests
from stages.model.skeleton import Skeleton
from stages.progress import Progress
from stages.recipe.model_plan import flattened
from state.identity import Environment, Identity, tokens_digest
from state.source import Source
from state.statistics import STATISTICS


def identify(
    folder: Path, source: Source, config: PretrainedConfig, tokens: NDArray[np.int32], progress: Progress
) -> Identity:
    """Digest of everything the statistics depend on. Reads the whole checkpoint once."""
    progress.stage("reading the weights' identity")
    return Identity(
        tensors=source.digests(threads=min(8, os.cpu_count() or 1)),
        config=flattened(config),
        tokenizer=tokenizer_digests(folder),
        tokens=tokens_digest(tokens),
        statistics=tuple(sorted(STATISTICS)),
    )


def environment(skeleton: Skeleton, device: torch.device, experts: str, batch: int) -> Environment:
    """What the bits of the forward depend on besides its inputs.

    experts: the implementation asked for; it counts only where the model class has a choice.
    """
    return Environment(
        torch=torch.__version__,
        transformers=version("transformers"),
        modelopt=version("nvidia-modelopt"),
        device=torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        experts=experts if skeleton.model._can_set_experts_implementation() else "none",
        dtype=str(skeleton.model.dtype).removeprefix("torch."),
        batch=batch,
        threads=torch.get_num_threads(),
    )
