"""All families, by name."""

import functools
from collections.abc import Callable

from tests.families import deepseek, fused, gemma4, qwen_vl, wrappers
from tests.families.layout import Family

FAMILIES: dict[str, Callable[[], Family]] = {
    "gpt-oss-bf16": fused.gpt_oss,
    "gpt-oss-mxfp4": functools.partial(fused.gpt_oss, stored=True),
    "granite-moe": fused.granite_moe,
    "granite-4-hybrid": fused.granite_hybrid,
    "qwen3-vl": qwen_vl.qwen3_vl,
    "qwen3-vl-moe": functools.partial(qwen_vl.qwen3_vl, moe=True),
    "qwen2.5-vl": qwen_vl.qwen2_5_vl,
    "qwen3.5": qwen_vl.qwen3_5,
    "qwen3.5-moe": functools.partial(qwen_vl.qwen3_5, moe=True),
    "mistral-3": wrappers.mistral3,
    "ministral-3": functools.partial(wrappers.mistral3, ministral=True),
    "gemma-3": wrappers.gemma3,
    "gemma-4-26b-a4b": gemma4.gemma4_moe,
    "gemma-4-e2b": gemma4.gemma4_e2b,
    "llama-4": wrappers.llama4,
    "deepseek-v2-lite": deepseek.deepseek_v2,
    "deepseek-v3": deepseek.deepseek_v3,
    "deepseek-v3-fp8": functools.partial(deepseek.deepseek_v3, fp8=True),
    "deepseek-v3.2": deepseek.deepseek_v32,
    "glm-5": functools.partial(deepseek.deepseek_v32, glm=True),
    "glm-4.5": deepseek.glm4_moe,
    "kimi-k2-fp8": deepseek.kimi_k2,
    "kimi-k2.5-int4": wrappers.kimi_k2_5,
}
"""Name -> what makes its specification."""
