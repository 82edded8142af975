"""`config.json` and `hf_quant_config.json` of a quantized checkpoint."""

import json
from pathlib import Path
from typing import Any

from stages.model.cast_source import with_dtype
from stages.model.dequantize.stated import without_quantization
from state.source import read_json


def config_files(folder: Path, hf_quant_config: dict[str, Any], dtype: str | None = None) -> dict[str, str]:
    """Name → text of both files.

    config.json is the source's own, and the quantization: what transformers writes of a configuration lacks
    keys that readers of another version need, such as `rope_theta`, without which those take a default.

    Args:
        folder: of the source.
        hf_quant_config: modelopt's quantization config, names as on the hub.
        dtype: torch's name of the dtype that was asked for instead of the source's own.
    """
    from modelopt.torch.export.convert_hf_config import convert_hf_quant_config_format

    path = folder / "config.json"
    content = without_quantization(read_json(path, path.read_bytes(), unique=False))
    if dtype is not None:
        content = with_dtype(content, dtype)
    files = {}
    quantization = hf_quant_config.get("quantization", {})
    if quantization.get("quant_algo") is not None or quantization.get("kv_cache_quant_algo") is not None:
        content["quantization_config"] = convert_hf_quant_config_format(hf_quant_config)
        files["hf_quant_config.json"] = _json(hf_quant_config)
    return {"config.json": _json(content), **files}


def with_pre_quant_scale(hf_quant_config: dict[str, Any], separate: bool) -> dict[str, Any]:
    """modelopt's quantization config, saying whether AWQ's scales are tensors of the checkpoint or folded.

    NVFP4 is named NVFP4_AWQ where they are separate, for weights alone too; INT4 formats have a field for it.
    """

    def stated(entry: dict[str, Any]) -> dict[str, Any]:
        if separate and entry.get("quant_algo") in ("NVFP4", "W4A16_NVFP4"):
            return entry | {"quant_algo": "NVFP4_AWQ", "has_zero_point": False, "pre_quant_scale": True}
        return entry | {"pre_quant_scale": separate} if "pre_quant_scale" in entry else entry

    quantization = dict(stated(hf_quant_config["quantization"]))
    if "quantized_layers" in quantization:
        layers = {name: stated(entry) for name, entry in quantization["quantized_layers"].items()}
        quantization["quantized_layers"] = layers
    return hf_quant_config | {"quantization": quantization}


def _json(content: dict[str, Any]) -> str:
    return json.dumps(content, indent=2, ensure_ascii=False) + "\n"
