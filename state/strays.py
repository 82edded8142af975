"""Files among those of a run's store that no commit names. They may be anybody's."""

import os
from collections.abc import Collection, Iterator
from pathlib import Path

from state.durable import Disk
from state.head import Head
from state.paths import HEAD, HEADS, RECORD_COPY, ZARR
from state.recovery import older_heads
from state.remove import named_by
from state.writing import all_writing


def strays(run: Path, heads: Collection[Head], disk: Disk) -> Iterator[str]:
    """Every file in `heads/` and `calibration.zarr/`, and one in HEAD's way, that neither a head names nor
    the record of a commit that is being written, or was cut short.
    """
    oldest = min((head.number for head in heads), default=0)
    named = named_by([*heads, *older_heads(run, disk, oldest)]) | {RECORD_COPY}
    for record in all_writing(run, disk.list(run / HEADS), disk):
        named.update((record.path, *record.files))
    if f"{HEAD}.tmp" not in named and os.path.lexists(run / f"{HEAD}.tmp"):
        yield f"{HEAD}.tmp"
    for top in (HEADS, ZARR):
        for folder, _, files in os.walk(run / top):
            for name in files:
                path = (Path(folder) / name).relative_to(run).as_posix()
                if path not in named and not path.endswith(".dropped"):
                    yield path
