"""Llama in FP8 with one scale a matrix or a row, as compressed-tensors writes it; or with nothing said."""

from typing import Literal

from tests.families.configs import Config
from tests.families.dense import llama
from tests.families.layout import Family


def llama_fp8(per: Literal["tensor", "channel"] = "tensor") -> Family:
    """Every linear of the layers in FP8, its inputs to be quantized while running."""
    family = llama()
    config = family.config | {"quantization_config": _compressed_tensors(per)}
    form: Literal["fp8_tensor", "fp8_channel"] = "fp8_tensor" if per == "tensor" else "fp8_channel"
    return Family(f"llama-3-fp8-{per}", config, family.layout, (), form, ("*_proj.weight",))


def llama_fp8_unmarked() -> Family:
    """The same with a scale a matrix, and no `quantization_config`: the tensors alone tell."""
    family = llama()
    return Family("llama-3-fp8-unmarked", family.config, family.layout, (), "fp8_tensor", ("*_proj.weight",))


def _compressed_tensors(per: str) -> Config:
    weights = {"num_bits": 8, "type": "float", "symmetric": True, "strategy": per, "dynamic": False}
    inputs = {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "token", "dynamic": True}
    return {
        "quant_method": "compressed-tensors",
        "format": "float-quantized",
        "quantization_status": "compressed",
        "config_groups": {
            "group_0": {"targets": ["Linear"], "weights": weights, "input_activations": inputs}
        },
        "ignore": ["lm_head"],
    }
