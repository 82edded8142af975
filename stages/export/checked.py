"""Whether what was copied from the source is what the run was calibrated with."""

from collections.abc import Iterable, Mapping

from stages.export.provenance import refuse_other_tensors
from state.identity import digest
from state.source import Source


class CheckedSource:
    """Compares tensors with what the run recorded of them.

    A tensor that holds all experts is compared as a whole only once, with its first expert; for each further
    one that expert's bytes are compared with what they were then. Otherwise the work would grow with the
    square of the number of experts.

    Args:
        source: the tensors.
        digests: hub tensor → what the run recorded of it.
    """

    def __init__(self, source: Source, digests: Mapping[str, str]) -> None:
        self.source, self.digests = source, digests
        self._experts: dict[str, list[str]] = {}

    def require_same(self, names: Iterable[str], expert: int | None = None) -> None:
        """Compare tensors that have been copied, or one expert's part of each: what is written to the file
        from here on is not in the copies.

        Raises IdentityMismatch naming every tensor that is not the run's.
        """
        for name in names:
            if expert is None or name not in self.source.tensors:
                self._whole(name)
                continue
            if name not in self._experts:
                count = self.source.tensors[name].shape[0]
                found = [self._part(name, number, count) for number in range(count)]
                self._whole(name)
                self._experts[name] = found
            known = self._experts[name]
            if self._part(name, expert, len(known)) != known[expert]:
                self._refuse(name, self.source.digest(name))

    def _whole(self, name: str) -> None:
        found = self.source.digest(name)
        if found != self.digests.get(name):
            self._refuse(name, found)

    def _refuse(self, name: str, found: str) -> None:
        everything = self.source.digests(threads=2) | {name: found}
        refuse_other_tensors(self.source, self.digests, everything)

    def _part(self, name: str, expert: int, count: int) -> str:
        """The digest of what the tensor holds of one of `count` experts now."""
        data = self.source.read(name)
        each = len(data) // count
        return digest(data[expert * each : (expert + 1) * each])
