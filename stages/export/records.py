"""The records of an export as bytes: identity, journal and mark; and what they may say.

A record that does not read back to the very bytes that Holdfast writes for what it says is damaged. Names in
it are checked before anyone uses them: they come from a file that may come from anywhere.
"""

import json
import re
import stat
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TypeVar

from stages.engines.files import UNFINISHED
from state.durable import Disk
from state.errors import DamagedStore, InputError
from state.identity import digest

IDENTITY = "holdfast_export.json"
JOURNAL = "holdfast_journal.jsonl"
MARK = UNFINISHED
WRITING = "holdfast_writing.tmp"
REPORT = "export_report.json"
RECORDS = frozenset({IDENTITY, JOURNAL, MARK})
WORK_FILES = (f"{JOURNAL}.tmp", WRITING)
"""Files that are no record and lie only in a folder with a mark, while a command works in it."""

DIGEST = re.compile(r"(xxh3|tensors):[0-9a-f]{32}")
LONGEST_NAME = 255

T = TypeVar("T")


@dataclass(frozen=True)
class Written:
    """One finished file; digest is `xxh3:<32 hex digits>` of its bytes, or a shard's `tensors:...`, made from
    those of its tensors (`shards.digest_of_shard`).
    """

    file: str
    bytes: int
    digest: str


@dataclass(frozen=True)
class Mark:
    """Says that a folder is unfinished, and whose.

    out: the name of the folder that it is to become. exchange: None for a folder that is built or was renamed
    as a whole; the files that may be deleted or replaced in it, where files are exchanged one by one.
    """

    out: str
    exchange: tuple[Written, ...] | None = None


def is_plain(name: str) -> bool:
    """Whether a name leads to a place inside the folder it is used in: relative, without `.` and `..`."""
    try:
        parts = [part.encode() for part in PurePosixPath(name).parts]
    except UnicodeEncodeError:
        return False
    return (
        name not in ("", ".")
        and "\0" not in name
        and PurePosixPath(name).as_posix() == name
        and not name.startswith("/")
        and b".." not in parts
        and all(len(part) <= LONGEST_NAME for part in parts)
    )


def written(name: str, data: bytes | bytearray | memoryview) -> Written:
    """The journal's entry for a file with these bytes."""
    return Written(name, memoryview(data).nbytes, digest(data))


def encode_identity(identity: Mapping[str, str]) -> bytes:
    """The bytes of `holdfast_export.json`."""
    return (json.dumps(dict(sorted(identity.items())), indent=2, ensure_ascii=False) + "\n").encode()


def decode_identity(data: bytes) -> dict[str, str]:
    """Raises ValueError for other bytes than `encode_identity` makes."""
    content = json.loads(data)
    if not isinstance(content, dict) or not all(isinstance(value, str) for value in content.values()):
        raise ValueError("an identity is an object of texts")
    return _unchanged(content, encode_identity, data)


def encode_journal(journal: Mapping[str, Written]) -> bytes:
    """The bytes of `holdfast_journal.jsonl`."""
    lines = [json.dumps(vars(journal[name]), ensure_ascii=False) + "\n" for name in sorted(journal)]
    return "".join(lines).encode()


def decode_journal(data: bytes) -> dict[str, Written]:
    """Raises ValueError for other bytes than `encode_journal` makes, and for names that are not plain."""
    entries = [_entry(json.loads(line)) for line in data.decode().removesuffix("\n").split("\n")]
    return _unchanged({entry.file: entry for entry in entries}, encode_journal, data)


def encode_mark(mark: Mark) -> bytes:
    """The bytes of `holdfast_partial.json`, which end with a digest of the rest."""
    content: dict[str, object] = {
        "out": mark.out,
        "exchange": None if mark.exchange is None else [vars(entry) for entry in mark.exchange],
    }
    content["digest"] = digest(json.dumps(content).encode())
    return (json.dumps(content, indent=2) + "\n").encode()


def decode_mark(data: bytes) -> Mark:
    """Raises ValueError for other bytes than `encode_mark` makes, and for names that are not plain."""
    content = json.loads(data)
    if not isinstance(content, dict) or not isinstance(content.get("out"), str):
        raise ValueError("a mark names a folder")
    files = content.get("exchange")
    exchange = tuple(map(_entry, files)) if isinstance(files, list) else None
    return _unchanged(Mark(content["out"], exchange), encode_mark, data)


def read_record(disk: Disk, path: Path, decode: Callable[[bytes], T], remedy: str) -> T | None:
    """What a record says; None where there is none.

    Args:
        remedy: what to do about a damaged one, for the message.

    Raises:
        DamagedStore: it is not what Holdfast wrote.
        InputError: it can't be read now.
    """
    try:
        if not stat.S_ISREG(path.lstat().st_mode):
            raise DamagedStore(f"{path} is not the file that Holdfast wrote there; {remedy}", [path.name])
        return decode(disk.read(path))
    except FileNotFoundError:
        return None
    except OSError as error:
        raise InputError(
            f"{path} can't be read now: {error.strerror}. Give the same command again."
        ) from error
    except (ValueError, RecursionError) as error:
        raise DamagedStore(
            f"{path} is damaged: its bytes are not those that Holdfast wrote; {remedy}", [path.name]
        ) from error


def missing_record(path: Path, remedy: str) -> DamagedStore:
    """The error for a record that should be there."""
    return DamagedStore(f"{path} is missing; {remedy}", [path.name])


def shown(names: Iterable[str]) -> str:
    """Some names for a message: the first five, and how many more."""
    listed = sorted(names)
    more = f" and {len(listed) - 5} more" if len(listed) > 5 else ""
    return ", ".join(listed[:5]) + more


def _entry(value: object) -> Written:
    match value:
        case {"file": str(name), "bytes": int(size), "digest": str(found), **rest} if not rest:
            reserved = name in (JOURNAL, MARK, *WORK_FILES)
            if (
                is_plain(name)
                and not reserved
                and type(size) is int
                and size >= 0
                and DIGEST.fullmatch(found)
            ):
                return Written(name, size, found)
    raise ValueError("an entry has a plain name, a size and a digest")


def _unchanged(content: T, encode: Callable[[T], bytes], data: bytes) -> T:
    if encode(content) != data:
        raise ValueError("these are not the bytes that Holdfast writes")
    return content
