"""The results of a gate run, as every report takes them."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import msgspec

from quantgate.task import GENERATE, Task
from quantgate.verdict import Outcome, Verdict, worst


@dataclass(frozen=True)
class CheckResult:
    """One check of one checkpoint."""

    checkpoint: str
    scheme: str
    check: str
    verdict: Verdict
    seconds: float = 0.0
    """How long its test took; the first check to need a measurement pays for it."""
    task: Task = GENERATE

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, which cross from an xdist worker to its controller."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> CheckResult:
        """Undo `to_dict`."""
        return msgspec.convert(values, cls)


def overall(results: list[CheckResult]) -> Outcome:
    """Return the verdict on a whole run; a run without a check is "not-run"."""
    return worst([result.verdict.counted for result in results])
