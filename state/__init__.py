"""What survives: the store of a run, its layout, identity and durability. No torch in here."""

from state.reader import Calibration
from state.reader import open_run as open

__all__ = ["Calibration", "open"]
