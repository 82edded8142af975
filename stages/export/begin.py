"""A new OUT.partial: made under another name with its records inside, then renamed.

So a folder of this name is never without its mark, and one that is without it is somebody else's.
"""

from collections.abc import Mapping

from stages.export.ownership import remove_file
from stages.export.place import Place
from stages.export.records import (
    IDENTITY,
    JOURNAL,
    MARK,
    Mark,
    Written,
    encode_identity,
    encode_journal,
    encode_mark,
    written,
)
from state.durable import Disk
from state.errors import InputError


def begin_partial(disk: Disk, place: Place, identity: Mapping[str, str]) -> dict[str, Written]:
    """Make OUT.partial, which is absent or empty. Returns its journal, which names the identity alone.

    Raises:
        InputError: a folder of somebody else is where it would be made.
    """
    mark, described = encode_mark(Mark(place.out.name)), encode_identity(identity)
    journal = {IDENTITY: written(IDENTITY, described)}
    _clear(disk, place, mark)
    disk.put(place.new / MARK, mark)
    disk.sync([place.new])
    disk.put(place.new / IDENTITY, described)
    disk.put(place.new / JOURNAL, encode_journal(journal))
    disk.sync([place.new])
    disk.rename(place.new, place.partial)
    return journal


def _clear(disk: Disk, place: Place, mark: bytes) -> None:
    """Delete what a kill left of an earlier attempt: the mark, or the beginning of one, and then records."""
    present = disk.list(place.new)
    if not present:
        return
    found = disk.read(place.new / MARK) if (place.new / MARK).is_file() else None
    torn = found is not None and present == [MARK] and mark.startswith(found)
    if not torn and (found != mark or not {MARK, IDENTITY, JOURNAL} >= set(present)):
        raise InputError(f"{place.new} is in the way and not Holdfast's; move it away, or choose another OUT")
    for name in (JOURNAL, IDENTITY):
        remove_file(disk, place.new / name)
    disk.sync([place.new])
    remove_file(disk, place.new / MARK)
