"""A world in which commands are given, one after the other or at once, and what must be so afterwards."""

import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

from tests.crash import server
from tests.crash.commands import SCENARIOS, filled_in
from tests.crash.compare import content, differing
from tests.crash.interposer import Seen, Watcher
from tests.crash.server import Ended
from tests.crash.trial import Laboratory
from tests.crash.verdict import NAMED, last_lines
from tests.crash.world import begin

WAITS = 20.0


class Wrong(Exception):
    """What must not be; the message says what."""


class Acting:
    """A watcher that does something ahead of operation `number` (from 0) of those on paths that end so."""

    def __init__(self, operation: str, ending: str, number: int, action: Callable[[], object]) -> None:
        self._operation, self._ending, self._left = operation, ending, number
        self._action = action

    def before(self, seen: Seen, half: object) -> None:
        """Act once."""
        if seen.operation == self._operation and seen.path.endswith(self._ending):
            self._left -= 1
            if self._left == -1:
                self._action()

    def after(self, seen: Seen) -> None:
        """Nothing."""


class Stage:
    """A world in which commands are given, one after the other or at once."""

    def __init__(self, laboratory: Laboratory, folder: Path) -> None:
        self.laboratory, self.world = laboratory, folder / "world"
        self._folder = folder
        self._count = 0

    def from_state(self, template: str | None) -> None:
        """Begin from a state."""
        begin(self.world, self.laboratory.template(template))

    def start(self, arguments: list[str], watcher: Watcher | None = None) -> Callable[[], Ended]:
        """Give a command; what is returned waits for its end. MODEL and DATA are filled in."""
        self._count += 1
        log = self._folder / f"log{self._count}"
        filled = filled_in(arguments, self.laboratory.source)
        process = server.start(partial(server.command, self.world, filled, watcher), log)
        return partial(server.wait, process, log)

    def give(self, arguments: list[str], watcher: Watcher | None = None) -> Ended:
        """Give a command and wait for its end."""
        return self.start(arguments, watcher)()

    def must_end(self, ended: Ended, code: int) -> None:
        """Raise `Wrong` unless a command ended with this exit code, and named something if it is not 0."""
        if ended.code != code or (code and not NAMED.search(ended.output)):
            raise Wrong(f"exit {ended.code} instead of {code}: {last_lines(ended)}")

    def must_be(self, scenario: str, world: Path | None = None) -> None:
        """Raise `Wrong` unless a world is what the scenario leaves."""
        expected = self.laboratory.ends[scenario]
        found = content(world or self.world, arguments_makes(scenario))
        if found is None or (names := differing(expected, found)):
            raise Wrong(f"other bytes: {', '.join(names[:3]) if found else 'nothing is there'}")

    def wait_for(self, path: Path) -> None:
        """Wait until a file is there."""
        until = time.monotonic() + WAITS
        while not path.exists():
            if time.monotonic() > until:
                raise Wrong(f"{path.name} never came")
            time.sleep(server.POLL)


def arguments_of(scenario: str) -> list[str]:
    """The arguments of a scenario."""
    return next(one.arguments for one in SCENARIOS if one.name == scenario)


def arguments_makes(scenario: str) -> str:
    """What a scenario makes: `run` or `out`."""
    return next(one.makes for one in SCENARIOS if one.name == scenario)
