"""NVFP4 for weights alone: inputs stay as they are."""

from dataclasses import dataclass

from stages.formats.nvfp4 import Nvfp4


@dataclass(frozen=True)
class W4a16Nvfp4(Nvfp4):
    """Stored as NVFP4 is, without an input's scale."""

    name = "w4a16_nvfp4"
    inputs = "plain"


W4A16_NVFP4 = W4a16Nvfp4()
