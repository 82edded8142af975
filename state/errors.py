"""Every error a person can meet, with the exit code that `holdfast` returns for it."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path


class HoldfastError(Exception):
    """Base of all expected errors. The message is one clear text for the person at the keyboard."""

    exit_code = 1


class InputError(HoldfastError):
    """Something given to Holdfast is missing, malformed or not supported."""

    exit_code = 2


class RunBusy(InputError):
    """Another process holds the run's lock."""


class Unreadable(InputError):
    """A file can't be read now, though it may be whole: nothing is believed of it, and nothing is changed.

    `number` is the errno.
    """

    def __init__(self, path: Path, number: int, reason: str) -> None:
        super().__init__(
            f"{path} can't be read now: {reason}. Nothing that was committed is touched; try again. If it "
            "stays so and belongs to a run, `holdfast repair RUN` sets it aside."
        )
        self.path = path
        self.number = number
        self.reason = reason


class WriteFailed(InputError):
    """The device reported an error while a file was written, and not for want of space."""

    def __init__(self, path: Path, reason: str) -> None:
        super().__init__(
            f"{path} could not be written: {reason}. What was committed before is intact; look after the "
            "device, then give the same command again."
        )
        self.path = path
        self.reason = reason


class OutOfSpace(InputError):
    """A write failed for want of space.

    `path` is the file being written, `needed` the bytes that the whole operation wants to write.
    """

    def __init__(self, path: Path, needed: int, free: int, reason: str) -> None:
        super().__init__(
            f"{reason} while writing {path}: {needed:,} bytes are needed and {free:,} are free. "
            "What was committed before is intact; make room, then give the same command again."
        )
        self.path = path
        self.needed = needed
        self.free = free
        self.reason = reason


@dataclass(frozen=True)
class Difference:
    """One field with two values; None where the field does not exist."""

    field: str
    stored: str | None
    current: str | None

    def __str__(self) -> str:
        stored, current = ("absent" if one is None else one for one in (self.stored, self.current))
        return f"{self.field}: stored {stored}, now {current}"


class IdentityMismatch(HoldfastError):
    """What is stored was made from other content, or in another environment, than what is given now."""

    exit_code = 3

    def __init__(self, message: str, differences: Sequence[Difference]) -> None:
        super().__init__(message)
        self.differences = tuple(differences)


class DamagedStore(HoldfastError):
    """A stored object is missing or its bytes are not those that were committed.

    `objects` are the paths, relative to the run, of what is damaged.
    """

    exit_code = 4

    def __init__(self, message: str, objects: Sequence[str] = ()) -> None:
        super().__init__(message)
        self.objects = tuple(objects)


class Stopped(HoldfastError):
    """A signal asked for a stop; the work so far is committed (EX_TEMPFAIL: the same command goes on)."""

    exit_code = 75
