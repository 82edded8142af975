"""Export: from a run and its source to a quantized checkpoint. Plans everything, then writes."""

from collections.abc import Iterable, Iterator
from dataclasses import replace
from itertools import groupby
from time import monotonic

import torch

from stages.export.closing import require_readable
from stages.export.dry_run import forecast
from stages.export.flow import in_order
from stages.export.folder import ExportFolder, open_folder
from stages.export.plan import ExportPlan, plan_export
from stages.export.reading import SourceReader
from stages.export.records import REPORT
from stages.export.report import ExportReport
from stages.export.shards import Assembly, Made
from stages.export.solved_inputs import NOT_AS_SOLVED
from stages.export.standing import Wanted
from stages.export.tensors import TensorMaker, Work, all_work
from stages.progress import Progress, Silent
from stages.recipe.quantizer_plan import told_left_out
from stages.settings import ExportSettings
from state.durable import Disk
from state.errors import OutOfSpace
from state.large_reads import LargeReads

WARNED = frozenset({"conflict=max", "dead=floor", "unseen=weights-only"})
"""Policies whose use may need an answer from the person."""

WORKERS = 4
"""Threads that pack, at most; each has its share of torch's threads."""

AHEAD = 1 << 26
"""Bytes of the source that are read ahead, for each thread that packs."""

MOST_TOLD = 5
"""Findings of the last look that are told."""

SLACK = 1 << 20
"""Bytes set aside for headers, journal and report when free space is checked."""


def export(
    settings: ExportSettings, progress: Progress | None = None, disk: Disk | None = None
) -> ExportReport:
    """Make the checkpoint `settings.out`, or go on making it, or find it finished and write nothing; with
    `settings.dry_run`, only say what it would be.

    Raises:
        InputError: the run is unfinished, the recipe or the source can't be served, or a policy says `error`.
        IdentityMismatch: the source is not the run's, or changes meanwhile, or OUT is another export and
            `overwrite` is off.
        RunBusy, OutOfSpace, DamagedStore: see `open_folder` and `Disk`.
    """
    progress, disk = progress or Silent(), disk or Disk()
    started = monotonic()
    plan = plan_export(settings, progress)
    files = {shard.file for shard in plan.shards} | plan.files.keys()
    wanted = Wanted(plan.identity, files, plan.report.recipe)
    if settings.dry_run:
        ahead = AHEAD * _workers()
        return forecast(plan, wanted, settings.out, settings.overwrite, ahead, _workers())
    with open_folder(settings.out, wanted, disk, settings.overwrite, progress) as folder:
        if folder.finished:
            progress.note(f"{settings.out} is finished already; nothing was written")
            return replace(
                plan.report,
                already_finished=True,
                shards_kept=len(plan.shards),
                seconds=monotonic() - started,
            )
        _refuse_full_disk(folder, plan, disk)
        kept = sum(shard.file in folder.journal for shard in plan.shards)
        _write(folder, plan, progress)
        plan.ingredients.source.require_unchanged()
        _look(folder, plan, progress)
        folder.publish()
    _tell_policies(plan.report, progress)
    written = len(plan.shards) - kept
    return replace(plan.report, shards_written=written, shards_kept=kept, seconds=monotonic() - started)


def _write(folder: ExportFolder, plan: ExportPlan, progress: Progress) -> None:
    done = sum(shard.nbytes for shard in plan.shards if shard.file in folder.journal)
    if done:
        progress.note(f"going on: {done:,} of {plan.report.nbytes:,} bytes are written and verified")
    progress.start("writing", total=plan.report.nbytes, unit="bytes", done=done)
    if REPORT not in folder.journal:
        folder.write(REPORT, plan.files[REPORT])  # first: it tells people what the unfinished folder becomes
    _write_shards(folder, plan, progress)
    for name, data in plan.files.items():
        if name not in folder.journal:
            folder.write(name, data)
    progress.finish()


def _write_shards(folder: ExportFolder, plan: ExportPlan, progress: Progress) -> None:
    """Write what is missing: one thread reads, some pack, this one writes."""
    missing = {shard.file: shard for shard in plan.shards if shard.file not in folder.journal}
    given, threads, workers = plan.ingredients, torch.get_num_threads(), _workers()
    with LargeReads() as files:
        asked = all_work(missing.values(), given, SourceReader(given.source, given.digests, files))
        made = in_order(
            asked,
            TensorMaker(given).make,
            lambda work: work.nbytes,
            limit=AHEAD * workers,
            workers=workers,
            prepare=lambda: torch.set_num_threads(threads // workers),
        )
        try:
            for file, results in groupby(made, key=lambda result: result[0].file):
                shard = Assembly(missing[file].specs)
                folder.write_shard(file, shard, _told(results, progress))
                progress.advance(0, shards=1)
        finally:
            made.close()
            torch.set_num_threads(threads)


def _look(folder: ExportFolder, plan: ExportPlan, progress: Progress) -> None:
    """Look at all that was written, unless an earlier process has, and was stopped as it put it into OUT."""
    if not all((folder.partial / name).is_file() for name in folder.wanted.files):
        return
    for finding in require_readable(folder.partial, plan.weights_only)[:MOST_TOLD]:
        progress.warn(f"{finding}; holdfast verify says more")


def _workers() -> int:
    return max(1, min(WORKERS, torch.get_num_threads() // 2))


def _told(results: Iterable[tuple[Work, list[Made]]], progress: Progress) -> Iterator[Made]:
    for _, parts in results:
        for part in parts:
            yield part
            progress.advance(memoryview(part.data).nbytes)


def _tell_policies(report: ExportReport, progress: Progress) -> None:
    for use in report.policies:
        if use.policy == NOT_AS_SOLVED:
            progress.warn(use.detail)
    for policy, count in report.policy_counts().items():
        tell = progress.warn if policy in WARNED else progress.note
        tell(f"policy {policy} acted on {count} quantizers; {REPORT} names them")
    for line in told_left_out(report.left_out):
        progress.note(line)


def _refuse_full_disk(folder: ExportFolder, plan: ExportPlan, disk: Disk) -> None:
    needed = SLACK + sum(shard.nbytes for shard in plan.shards if shard.file not in folder.journal)
    free = disk.free_bytes(folder.partial)
    if needed > free:
        raise OutOfSpace(folder.out, needed, free, "too little space")
