"""One family through every recipe and schedule, in forks of a process that has imported everything."""

import json
import pickle
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from tests.crash.server import Ended, call, command
from tests.families.checkpoint import Checkpoint
from tests.families.judge import Asked, Case, faults, folded_input_faults, weight_faults
from tests.families.layout import Family
from tests.families.logits import dequantized, distance, logits, write_plain
from tests.families.parity import RECIPES, differences, export_by_modelopt, in_hub_names
from tests.families.replay import content, replay
from tests.families.tokenizer import write_text
from tests.families.write import write_family

SAMPLES, SEQ, BATCH = 8, 32, 4
SIZES = ["--samples", str(SAMPLES), "--seq", str(SEQ), "--batch", str(BATCH)]
SCHEDULES = ("whole", "layerwise")
LONGEST = 120.0

WORSE = 1.3
"""A solver may leave logits this many times further off than rounding to nearest, never more."""


@dataclass(frozen=True)
class Column:
    """One recipe of the table. Where weights are solved, calibration runs for it."""

    title: str
    recipe: str
    asked: Asked = field(default_factory=Asked)


COLUMNS = (
    Column("nvfp4", "nvfp4"),
    Column("fp8", "fp8"),
    Column("FP8 KV", "general/ptq/nvfp4_default-kv_fp8", Asked(kv=True)),
    Column("AWQ full", "nvfp4_awq_full", Asked(solved=True, folded=True)),
    Column("GPTQ", "general/ptq/nvfp4_default-kv_none-gptq", Asked(solved=True)),
    Column("tuned", "nvfp4_tuned", Asked(solved=True)),
)
PARITY = "as modelopt's"

WITH_LOGITS = ("nvfp4", "AWQ full", "GPTQ", "tuned")
"""Columns whose weights are put back into the class: rounding to nearest, and what is to be no worse."""


@dataclass
class Cell:
    """How one recipe under one schedule ended: `works`, `refused` with the reason, or `wrong` with the
    faults."""

    column: str
    schedule: str
    verdict: str
    said: list[str]
    seconds: float
    distance: float | None = None
    folds: dict[str, Any] = field(default_factory=dict)


def run_family(family: Family, folder: Path) -> list[Cell]:
    """All cells of a family. `folder` is emptied first, and holds what was made afterwards."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    bench = Bench(family, folder)
    return [cell for schedule in SCHEDULES for cell in bench.schedule(schedule)]


class Bench:
    """A family's source, text and runs in one folder."""

    def __init__(self, family: Family, folder: Path) -> None:
        self.family, self.folder = family, folder
        self.source = folder / "model"
        self.weights = write_family(family, self.source)
        self.plain = folder / "plain"
        write_plain(family, self.source, self.weights, self.plain)
        write_text(folder / "text.jsonl")
        self._case: Case | None = None
        self._wanted: torch.Tensor | None = None
        self._rounded: float | None = None

    def schedule(self, schedule: str) -> list[Cell]:
        """The cells of one schedule: a calibration, exports from it, and a pass for each solver."""
        run, cells = f"run-{schedule}", []
        began = time.monotonic()
        first = self._calibrate(run, schedule, "nvfp4")
        for column in COLUMNS:
            ended = first
            if column.asked.solved and first.code == 0:
                ended = self._calibrate(f"{run}-{column.recipe.rpartition('-')[2]}", schedule, column.recipe)
            cells.append(self._cell(column, schedule, run, ended, began))
            began = time.monotonic()
        if schedule == SCHEDULES[0]:
            cells.append(self._parity(cells))
        return cells

    def _parity(self, cells: list[Cell]) -> Cell:
        """The exports of `parity.RECIPES` beside modelopt's own."""
        began = time.monotonic()
        cell = Cell(PARITY, SCHEDULES[0], "works", [], 0.0)
        for column in COLUMNS:
            if column.recipe not in RECIPES or not (self.folder / self._out(column, SCHEDULES[0])).exists():
                continue
            theirs = self.folder / f"modelopt-{column.title.replace(' ', '-')}"
            batches = list(self.windows().split(BATCH))
            case, recipe, folder = self.case(), column.recipe, theirs
            try:
                forked(
                    lambda: export_by_modelopt(case, self.plain, recipe, batches, folder),  # noqa: B023
                    theirs.with_suffix(".pickle"),
                )
            except RuntimeError as error:
                cell.verdict, cell.said = "refused", [f"modelopt: {str(error)[-300:]}"]
                break
            ours, exported = (
                Checkpoint.read(self.folder / self._out(column, SCHEDULES[0])),
                Checkpoint.read(theirs),
            )
            if not any(name.endswith("weight_scale") for name in exported.tensors):
                cell.verdict, cell.said = "refused", ["modelopt: its exporter leaves every weight as it is"]
                break
            if not in_hub_names(case, exported):
                cell.verdict, cell.said = "refused", ["modelopt: it writes the names of the class"]
                break
            cell.said += differences(case, ours, exported)
        if cell.verdict == "works" and cell.said:
            cell.verdict = "wrong"
        if not any((self.folder / self._out(column, SCHEDULES[0])).exists() for column in COLUMNS):
            cell.verdict, cell.said = "refused", ["nothing was exported"]
        cell.seconds = round(time.monotonic() - began, 2)
        return cell

    def _out(self, column: Column, schedule: str) -> str:
        return f"{schedule}-{column.title.replace(' ', '-')}"

    def _calibrate(self, run: str, schedule: str, recipe: str) -> Ended:
        options = ["--schedule", schedule, "--recipe", recipe, *SIZES]
        return self._command(["calibrate", "model", "text.jsonl", run, *options])

    def _cell(self, column: Column, schedule: str, run: str, ended: Ended, began: float) -> Cell:
        out = self._out(column, schedule)
        if column.asked.solved:
            run = f"{run}-{column.recipe.rpartition('-')[2]}"
        late = (self.folder / run).exists()
        if ended.code == 0:
            late = column.asked.solved or column is COLUMNS[0]
            ended = self._command(["export", run, out, "--recipe", column.recipe])
        cell = Cell(column.title, schedule, "works", [], 0.0)
        if ended.code == 2 and "Traceback" not in ended.output:
            cell.verdict, cell.said = "refused", [reason(ended.output)]
            if late:
                cell.verdict, cell.said = "wrong", [f"refused after work was done: {cell.said[0]}"]
        elif ended.code != 0:
            cell.verdict, cell.said = "wrong", [f"exit {ended.code}: {ended.output[-600:]}"]
        else:
            self._judge(column, out, cell)
        cell.seconds = round(time.monotonic() - began, 2)
        return cell

    def _judge(self, column: Column, out: str, cell: Cell) -> None:
        export = Checkpoint.read(self.folder / out)
        cell.said = faults(self.case(), export, column.asked)
        whole = not any(weight_faults(self.case(), export, column.asked))
        if whole and column.title in WITH_LOGITS:
            self._judge_loaded(column, export, out, cell)
        if self.family.stored != "plain" and cell.schedule == SCHEDULES[0] and whole:
            cell.said += self._copy_faults(column, export)
        cell.said += untuned(self.folder / out / "export_report.json")
        cell.folds = folds(self.folder / out / "export_report.json")
        if cell.said:
            cell.verdict = "wrong"

    def _copy_faults(self, column: Column, export: Checkpoint) -> list[str]:
        """What differs from the export of a copy of the source that was dequantized beforehand."""
        run, out = f"copy-run-{column.title}", f"copy-{column.title}"
        for arguments in (
            ["calibrate", "plain", "text.jsonl", run, "--recipe", column.recipe, *SIZES],
            ["export", run, out, "--recipe", column.recipe],
        ):
            ended = self._command(arguments)
            if ended.code != 0:
                return [f"the dequantized copy: exit {ended.code}: {ended.output[-300:]}"]
        copy = Checkpoint.read(self.folder / out).tensors
        return [
            f"{name} is not that of the dequantized copy"
            for name in sorted(set(copy) | set(export.tensors))
            if not same(copy.get(name), export.tensors.get(name))
        ]

    def case(self) -> Case:
        """What to judge by, from an own forward over an own reading of the text."""
        if self._case is None:
            seen = forked(
                lambda: replay(self.family, self.weights, self.plain, list(self.windows().split(BATCH))),
                self.folder / "seen.pickle",
            )
            self._case = Case(self.family, self.weights, self.source, seen)
        return self._case

    def windows(self) -> torch.Tensor:
        """int64 [SAMPLES, SEQ]: documents in order, each with the end of text behind it."""
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(self.source)
        ids: list[int] = []
        for line in (self.folder / "text.jsonl").read_text().splitlines():
            ids += [*tokenizer(json.loads(line)["text"])["input_ids"], tokenizer.eos_token_id]
        return torch.tensor(ids[: SAMPLES * SEQ]).reshape(SAMPLES, SEQ)

    def _judge_loaded(self, column: Column, export: Checkpoint, out: str, cell: Cell) -> None:
        """Put the export's weights back into the class, and compare logits and, where scales were folded,
        inputs."""
        folder = self.folder / f"{out}-loaded"
        weights = dequantized(self.family, self.weights, export)
        write_plain(self.family, self.source, weights, folder)
        windows = self.windows()
        if self._wanted is None:
            self._wanted = forked(
                lambda: logits(self.family, self.plain, windows), self.folder / "wanted.pickle"
            )
        found = forked(lambda: logits(self.family, folder, windows), self.folder / f"{out}.pickle")
        cell.distance = distance(found, self._wanted)
        if column.title == "nvfp4":
            self._rounded = cell.distance
        elif self._rounded is not None and not cell.distance <= WORSE * self._rounded:
            cell.said.append(f"logits are off by {cell.distance:.4f}, rounding by {self._rounded:.4f}")
        if column.asked.folded:
            seen = forked(
                lambda: replay(self.family, weights, folder, [windows], torch.float32),
                self.folder / f"{out}-seen.pickle",
            )
            cell.said += folded_input_faults(self.case(), export, seen)
        shutil.rmtree(folder)

    def _command(self, arguments: list[str]) -> Ended:
        log = self.folder / f"{len(list(self.folder.glob('*.log'))):02}.log"
        log.write_text("holdfast " + " ".join(arguments) + "\n")

        def run() -> int:
            renew_threads()
            return command(self.folder, arguments)

        return call(run, log, LONGEST)


def untuned(report: Path) -> list[str]:
    """Modules that were to be tuned and keep GPTQ's weights, but for indexers, which only choose tokens."""
    policies = json.loads(report.read_text())["policies"]
    names = [name for use in policies if use["policy"] == "not-tuned" for name in use["quantizers"]]
    return [f"{name} is not tuned" for name in names if "index" not in name][:1]


def forked(work: Callable[[], Any], file: Path) -> Any:
    """What some work returns, done in a fork that leaves it in `file`, so that threads and memory of a
    forward stay out of this process."""

    def keep() -> int:
        renew_threads()
        file.write_bytes(pickle.dumps(work()))
        return 0

    log = file.with_suffix(".log")
    ended = call(keep, log, LONGEST)
    if ended.code != 0:
        raise RuntimeError(f"an own forward ended with {ended.code}: {ended.output[-600:]}")
    return pickle.loads(file.read_bytes())


def same(one: torch.Tensor | None, other: torch.Tensor | None) -> bool:
    """Whether two tensors are there and equal to the bit."""
    if one is None or other is None or one.dtype != other.dtype or one.shape != other.shape:
        return False
    return content(one.reshape(-1)) == content(other.reshape(-1))


def renew_threads() -> None:
    """Let torch make its pool of threads anew after a fork: threads of transformers' loader may race to do
    it."""
    torch.set_num_threads(1)


def reason(output: str) -> str:
    """What the command said about its refusal, on one line."""
    _, _, said = output.rpartition("holdfast: ")
    return " ".join(said.split())


def folds(report: Path) -> dict[str, Any]:
    """What export_report.json tells of folding."""
    told = json.loads(report.read_text())
    return {key: told[key] for key in ("folds", "folded", "not_folded") if key in told}
