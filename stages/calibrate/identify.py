"""What a calibration is made from, and in which environment: the two descriptions that decide whether work
can be reused.
"""

import os
import re
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import PretrainedConfig

from stages.model.folder import tokenizer_digests
from stages.model.own_code import code_digests
from stages.model.skeleton import Skeleton
from stages.progress import Progress
from stages.recipe.model_plan import flattened
from state.identity import Environment, Identity, tokens_digest
from state.source import Source
from state.statistics import STATISTICS

VARIABLES = (
    "MKL_CBWR",
    "MKL_ENABLE_INSTRUCTIONS",
    "ONEDNN_MAX_CPU_ISA",
    "DNNL_MAX_CPU_ISA",
    "ONEDNN_DEFAULT_FPMATH_MODE",
    "NVIDIA_TF32_OVERRIDE",
    "CUBLAS_WORKSPACE_CONFIG",
)
"""Variables that have a library take other kernels. ATEN_CPU_CAPABILITY shows in torch's own answer."""


def identify(
    folder: Path,
    source: Source,
    config: PretrainedConfig,
    skeleton: Skeleton,
    tokens: NDArray[np.int32],
    progress: Progress,
) -> Identity:
    """Digest of everything the statistics depend on. Reads the whole checkpoint once.

    config: as it was loaded; the skeleton's own was written to by its model.
    """
    progress.stage("reading the weights' identity")
    return Identity(
        tensors=source.digests(threads=min(8, os.cpu_count() or 1)),
        config=flattened(config),
        tokenizer=tokenizer_digests(folder),
        tokens=tokens_digest(tokens),
        statistics=tuple(sorted(STATISTICS)),
        code=code_digests(skeleton.model),
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
        cpu=" ".join(_cpu()),
        libraries=", ".join(_libraries(device)),
    )


def _cpu() -> list[str]:
    """The instruction sets that torch, MKL and oneDNN choose their kernels by. They count beside a GPU too:
    buffers such as rotary frequencies are computed here.
    """
    capability = [torch.backends.cpu.get_cpu_capability()]
    if torch.cpu._is_avx512_bf16_supported():
        capability.append("avx512_bf16")
    if torch.cpu._is_amx_tile_supported():
        capability.append("amx")
    return capability


def _libraries(device: torch.device) -> list[str]:
    """Those that round, beside torch itself, and the variables that are set for them."""
    built = torch.__config__.show()
    found = [
        f"{name} {match[1]}"
        for name, pattern in (
            ("MKL", r"Math Kernel Library Version ([\d.]+)"),
            ("oneDNN", r"MKL-DNN v([\d.]+)"),
        )
        if (match := re.search(pattern, built))
    ]
    if device.type == "cuda":
        import triton

        cudnn = torch.backends.cudnn.version()
        found += [f"CUDA {torch.version.cuda}", f"cuDNN {cudnn}", f"Triton {triton.__version__}"]
    return found + [f"{name}={os.environ[name]}" for name in VARIABLES if name in os.environ]
