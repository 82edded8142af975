"""The commands that are disturbed, each from the state that it begins from."""

from dataclasses import dataclass
from pathlib import Path

SIZES = ["--samples", "6", "--seq", "32", "--batch", "2", "--commit-every", "1e-9", "--device", "cpu"]
LAYERS = ["--schedule", "layerwise", "--activation-memory", "1"]
AWQ = "nvfp4_awq_full"
GPTQ = "general/ptq/nvfp4_default-kv_none-gptq"
SHARDS = ["--shard-size", "40000"]


@dataclass(frozen=True)
class Scenario:
    """One command.

    Attributes:
        name: of the scenario.
        arguments: of `holdfast`; MODEL and DATA are replaced.
        template: the state it begins from: another scenario's end, or a `Halfway`, by name; None: nothing.
        makes: `run` or `out`: what is compared in the end.
    """

    name: str
    arguments: list[str]
    template: str | None
    makes: str


@dataclass(frozen=True)
class Halfway:
    """The state that a scenario leaves, killed at its commit number `commits`."""

    name: str
    scenario: str
    commits: int


def calibrate(*options: str) -> list[str]:
    """The arguments of a calibration into `run`."""
    return ["calibrate", "MODEL", "DATA", "run", *SIZES, *options]


def quantize(*options: str) -> list[str]:
    """The arguments of both stages in one, by way of `run` to `out`."""
    return ["quantize", "MODEL", "DATA", "out", "--run", "run", *SIZES, *SHARDS, *options]


def export(*options: str) -> list[str]:
    """The arguments of an export of `run` to `out`, in several shards."""
    return ["export", "run", "out", *SHARDS, *options]


SCENARIOS = (
    Scenario("calibrate", calibrate("--schedule", "whole"), None, "run"),
    Scenario("layerwise", calibrate(*LAYERS), None, "run"),
    Scenario("layerwise AWQ", calibrate(*LAYERS, "--recipe", AWQ), None, "run"),
    Scenario("layerwise GPTQ", calibrate(*LAYERS, "--recipe", GPTQ), None, "run"),
    Scenario("second pass", calibrate(*LAYERS[2:], "--recipe", AWQ), "calibrate", "run"),
    Scenario("two passes", calibrate(*LAYERS[2:], "--recipe", GPTQ), "half calibrate", "run"),
    Scenario("resume", calibrate(*LAYERS, "--recipe", AWQ), "half AWQ", "run"),
    Scenario("resume GPTQ", calibrate(*LAYERS, "--recipe", GPTQ), "half GPTQ", "run"),
    Scenario("repair", ["repair", "run"], "damaged AWQ", "run"),
    Scenario("export", export(), "calibrate", "out"),
    Scenario("export again", export(), "half export", "out"),
    Scenario("export overwriting", export("--recipe", "fp8", "--overwrite"), "export", "out"),
    Scenario("export AWQ", export("--recipe", AWQ), "layerwise AWQ", "out"),
    Scenario("export GPTQ", export("--recipe", GPTQ), "layerwise GPTQ", "out"),
    Scenario("quantize", quantize(), None, "out"),
)


@dataclass(frozen=True)
class Spoilt:
    """The state that a scenario leaves with damage done to it: these files are deleted."""

    name: str
    scenario: str
    deleted: tuple[str, ...]


SPOILT = (Spoilt("damaged AWQ", "layerwise AWQ", ("run/HEAD",)),)

HALFWAY = (
    Halfway("half calibrate", "calibrate", 2),
    Halfway("half AWQ", "layerwise AWQ", 1),
    Halfway("half GPTQ", "layerwise GPTQ", 1),
    Halfway("half export", "export", 2),
)


def filled_in(arguments: list[str], source: Path) -> list[str]:
    """The arguments with the places of model and text."""
    places = {"MODEL": str(source / "model"), "DATA": str(source / "text.jsonl")}
    return [places.get(argument, argument) for argument in arguments]


def maker_of(state: str) -> str:
    """The scenario that a state comes from."""
    return {one.name: one.scenario for one in (*HALFWAY, *SPOILT)}.get(state, state)
