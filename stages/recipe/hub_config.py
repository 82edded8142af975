"""modelopt's quantization config in the hub's names."""

from typing import Any

from stages.model.skeleton import Skeleton


def in_hub_names(config: dict[str, Any], skeleton: Skeleton) -> dict[str, Any]:
    """Rename the modules of modelopt's exclude list and per-layer table from memory names to hub names.

    A trailing wildcard stays where it is.
    """
    quantization = config["quantization"]
    if "exclude_modules" in quantization:
        quantization["exclude_modules"] = [
            pattern for entry in quantization["exclude_modules"] for pattern in _hub_patterns(entry, skeleton)
        ]
    if "quantized_layers" in quantization:
        quantization["quantized_layers"] = {
            hub: entry
            for name, entry in quantization["quantized_layers"].items()
            for hub in skeleton.hub_names(name)
        }
    return config


def _hub_patterns(entry: str, skeleton: Skeleton) -> list[str]:
    for wildcard in (".*", "*"):
        if entry.endswith(wildcard):
            return [skeleton.hub_name(entry.removesuffix(wildcard)) + wildcard]
    return skeleton.hub_names(entry)
