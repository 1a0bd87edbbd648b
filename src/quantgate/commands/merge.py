"""`quantgate merge`: one report and one exit status of several shards."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from quantgate.errors import BadInput
from quantgate.reporting.merge import merge
from quantgate.reporting.run import Run
from quantgate.reporting.terminal import summary
from quantgate.reporting.write import FILES, write_reports


def run(directories: Sequence[Path], project: Path, report: Path) -> int:
    """Merge what shards have written into `report`; return 0 only if every check passed."""
    if report.resolve() in {directory.resolve() for directory in directories}:
        raise BadInput(f"--report {report}: a shard's results are there; give another one.")
    merged = merge(directories, project)
    write_reports(merged, report)
    return tell(merged, report)


def tell(merged: Run, report: Path) -> int:
    """Print the table of a run whose report is written; return its exit status."""
    print(summary(merged, width=0, color=sys.stdout.isatty()), end="")
    print(f"report: {', '.join(str(report / name) for name in FILES)}")
    return 0 if merged.released else 1
