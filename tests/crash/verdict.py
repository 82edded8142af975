"""What a trial showed: from how its commands ended, and from what they left."""

import re
from dataclasses import dataclass

from tests.crash.compare import Content, differing
from tests.crash.server import Ended

REFUSALS = frozenset({2, 3, 4, 75})
GOOD = frozenset({"identical", "refused by name"})
"""How a trial may end. 'refused by name': by the disturbed command; the same one again was identical."""

NAMED = re.compile(r"holdfast: .*?(/|run|out|link|copy|\.json|\.zarr|model|text)", re.DOTALL)


@dataclass(frozen=True)
class Verdict:
    """One word or two, and the reason where it is not a good one."""

    word: str
    reason: str = ""


def judge_end(ended: Ended, found: Content | None, expected: Content) -> Verdict | None:
    """What is wrong with how a command ended, if anything is: what it says must be so."""
    if ended.code == 0:
        if found is None:
            return Verdict("silent", "exit 0, and nothing is there")
        if names := differing(expected, found):
            return Verdict("silent", f"exit 0, and other bytes in {', '.join(names[:3])}")
        return None
    if ended.code is None:
        return Verdict("hung")
    if ended.code not in REFUSALS:
        return None if ended.killed else Verdict("unnamed", f"exit {ended.code}: {last_lines(ended)}")
    if not NAMED.search(ended.output):
        return Verdict("unnamed", f"exit {ended.code} names nothing: {last_lines(ended)}")
    return None


def judge_rest(
    ended: Ended,
    found: Content | None,
    expected: Content,
    kept: dict[str, int],
    anew: bool,
    more_work: bool = False,
) -> Verdict | None:
    """What is wrong after the last command, which nothing disturbed.

    kept: inodes of what was published when the disturbed command ended. anew: files were made anew, by a
    power cut or because they were given up. more_work: commits had to be made again.
    """
    if ended.code != 0 or found is None:
        return Verdict("stuck", f"exit {ended.code}: {last_lines(ended)}")
    if strays := found.strays - expected.strays:
        return Verdict("left over", ", ".join(sorted(strays)[:3]))
    if found.commits > expected.commits + 1 and not more_work:
        return Verdict("lost", f"{found.commits} commits instead of {expected.commits}")
    again = [path for path, inode in found.objects.items() if kept.get(path, inode) != inode]
    if again and not anew:
        return Verdict("lost", f"made again: {', '.join(again[:3])}")
    return None


def last_lines(ended: Ended) -> str:
    """The end of what a command said."""
    said = ended.output[ended.output.rfind("holdfast: ") :] if "holdfast: " in ended.output else ended.output
    return " ".join(said.split())[-400:]
