"""What vLLM, SGLang and TensorRT-LLM accept, as data and as rules over names, dtypes, shapes and scales.

Export refuses by these rules before it writes, and looks at what it wrote; verify judges any checkpoint.

    algos, exclusion, kv, stated, judge   what engines ask for and how they read: pure, of names alone
    files, modules                        a checkpoint's headers and configurations, by module
    layout, scalars, standing             the rules; findings has them by name
"""

from typing import Literal, get_args

Engine = Literal["vllm", "sglang", "trtllm"]

ENGINES: tuple[Engine, ...] = get_args(Engine)
SHOWN: dict[str, str] = {"vllm": "vLLM", "sglang": "SGLang", "trtllm": "TensorRT-LLM"}
"""Engine → what people call it."""
