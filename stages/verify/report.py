"""The report of a verification: what was looked at, which engines load the checkpoint, what is wrong."""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from stages.engines import Engine
from stages.engines.findings import RULES, Finding
from stages.verify.numbers import Numbers

REPORT = "verify_report.json"
WORTH = ("source-", "loss-")
"""What rules begin with that engines know nothing of."""


@dataclass(frozen=True)
class VerifyReport:
    """One verification, for `verify_report.json` and for the screen; it holds no paths and no times.

    target: the engine that was asked for, or `any`. formats: `quant_algo` → modules in it. engines: engine →
    why it does not load the checkpoint; empty where it does. left_out: what was not looked at, and why.
    tensors, nbytes: of the checkpoint. numbers: of `--numeric`.
    """

    target: str
    algo: str | None
    kv: str | None
    formats: Mapping[str, int]
    engines: Mapping[Engine, Sequence[str]]
    tensors: int
    nbytes: int
    findings: Sequence[Finding]
    left_out: Sequence[str] = field(default_factory=tuple)
    numbers: Numbers | None = None

    @property
    def whole(self) -> bool:
        """Whether nothing is wrong."""
        return not self.findings

    def loads(self, engine: Engine) -> bool:
        """Whether an engine loads the checkpoint and reads it rightly, whatever its weights are worth."""
        concerned = [
            finding
            for finding in self.findings
            if (not finding.engines or engine in finding.engines) and not finding.rule.startswith(WORTH)
        ]
        return not self.engines[engine] and not concerned

    def counts(self) -> dict[str, int]:
        """Rule → how many findings it has."""
        return dict(Counter(finding.rule for finding in self.findings))

    def encode(self) -> bytes:
        """The bytes of `verify_report.json`."""
        content: dict[str, Any] = {
            "whole": self.whole,
            "target": self.target,
            "quant_algo": self.algo,
            "kv_cache": self.kv,
            "formats": dict(self.formats),
            "engines": {
                engine: {"loads": self.loads(engine), "why_not": list(reasons)}
                for engine, reasons in self.engines.items()
            },
            "tensors": self.tensors,
            "bytes": self.nbytes,
            "findings": [
                {
                    "rule": finding.rule,
                    "must_hold": RULES[finding.rule],
                    "name": finding.name,
                    "says": finding.says,
                    "engines": list(finding.engines),
                }
                for finding in self.findings
            ],
            "left_out": list(self.left_out),
        }
        if self.numbers is not None:
            content["numeric"] = self.numbers.content()
        return (json.dumps(content, indent=2) + "\n").encode()  # in ASCII: names may be no UTF-8
