"""What a verification found, as a table; anything wrong ends the command with exit code 2."""

from math import exp
from pathlib import Path

from rich.console import Console
from rich.table import Table

from pipeline.progress import quantity
from pipeline.tables import print_rows
from stages.engines import SHOWN
from stages.verify.numbers import Numbers
from stages.verify.report import REPORT, VerifyReport
from state.errors import InputError
from state.reasons import printable

MOST_TOLD = 10
"""Findings of one rule that are shown; the report has all."""


def print_verification(report: VerifyReport, out: Path) -> None:
    """The checkpoint, the engines that load it, and what is wrong.

    Raises InputError where anything is.
    """
    kv = f", KV cache {report.kv}" if report.kv else ""
    rows = [
        ("checkpoint", f"{out} ({report.algo or 'no quant_algo'}{kv})"),
        *((f"stored as {name}", f"{count:,}") for name, count in report.formats.items()),
        ("read", f"{report.tensors:,} tensors, {quantity(report.nbytes, 'bytes')}"),
        *((SHOWN[engine], _standing(report, engine)) for engine in report.engines),
        *(_numbers(report.numbers) if report.numbers is not None else ()),
        *(("left out", printable(words)) for words in report.left_out),
    ]
    print_rows(rows)
    if not report.whole:
        _print_findings(report)
        rules = ", ".join(f"{rule} ({count:,})" for rule, count in report.counts().items())
        raise InputError(
            f"{out}: {len(report.findings):,} things are wrong: {rules}; all of them are in {out / REPORT}. "
            "Don't serve it: export it again, or fetch it again from where it came"
        )
    print(f"nothing is wrong with {out}")


def _numbers(numbers: Numbers) -> list[tuple[str, str]]:
    layers = ", ".join(f"{error:.3f}" for error in numbers.layers)
    worst = ", ".join(f"{name} {error:.3f}" for name, error in numbers.worst.items())
    loss = f"{numbers.loss:.4f}, {numbers.increase:+.4f} ± {numbers.error:.4f} over {numbers.source_loss:.4f}"
    perplexity = f"{exp(numbers.loss):.3f} over {exp(numbers.source_loss):.3f}"
    return [
        ("text", f"{numbers.windows:,} windows, {numbers.tokens:,} tokens predicted"),
        ("loss", f"{loss} of the source"),
        ("perplexity", f"{perplexity} of the source"),
        ("KL", f"{numbers.kl:.4f} nats per token"),
        ("agreement", f"{numbers.agreement:.2%} of tokens have the same likeliest successor"),
        ("by layer", f"relative error {layers}"),
        ("furthest", worst),
    ]


def _standing(report: VerifyReport, engine: str) -> str:
    if reasons := report.engines[engine]:  # type: ignore[index]
        return "; ".join(reasons)
    return "loads it" if report.loads(engine) else "reads it wrongly, or not at all: see below"  # type: ignore[arg-type]


def _print_findings(report: VerifyReport) -> None:
    table = Table("rule", "where", "what", title="what is wrong", title_justify="left")
    for column in table.columns:
        column.overflow = "fold"
    for rule, count in report.counts().items():
        of_rule = [finding for finding in report.findings if finding.rule == rule]
        for finding in of_rule[:MOST_TOLD]:
            table.add_row(rule, printable(finding.name), printable(finding.says))
        if count > MOST_TOLD:
            table.add_row(rule, "...", f"{count - MOST_TOLD:,} more")
    Console(markup=False, highlight=False).print(table)
