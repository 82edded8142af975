"""What serving engines accept, as data and pure functions of names, dtypes and shapes: vLLM, SGLang and
TensorRT-LLM. Export refuses by these rules before it writes, and verify judges what is there.

No tensor is read here and nothing is imported but the standard library and names of fused linears.
"""

from typing import Literal, get_args

Engine = Literal["vllm", "sglang", "trtllm"]

ENGINES: tuple[Engine, ...] = get_args(Engine)
SHOWN: dict[str, str] = {"vllm": "vLLM", "sglang": "SGLang", "trtllm": "TensorRT-LLM"}
"""Engine → what people call it."""
