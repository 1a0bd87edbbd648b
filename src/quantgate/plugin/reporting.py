"""The end of a run: complete the results, write the reports, print the table."""

from __future__ import annotations

import datetime
import os
import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from quantgate.judging import checks
from quantgate.judging.golden import history_of
from quantgate.judging.results import CheckResult, upheld
from quantgate.judging.verdict import not_run
from quantgate.measuring import environment
from quantgate.measuring.cache import DiskCache
from quantgate.measuring.environment import library_versions
from quantgate.plugin.gate_run import PENDING, RUN, GateRun, cache_directory, report_directory
from quantgate.plugin.scheduling import check_of, group_of
from quantgate.plugin.workers import send
from quantgate.reporting.annotations import workflow_commands
from quantgate.reporting.merge import RESULTS
from quantgate.reporting.run import Run
from quantgate.reporting.terminal import summary
from quantgate.reporting.write import FILES, write_reports
from quantgate.subject.checkpoint import Checkpoint
from quantgate.subject.checkpoint_file import read_all_checkpoint_files

RERUN_CRASHED = "`dmesg` shows whether it was killed for lack of memory; run it again without -n"


def _in_order(run: GateRun) -> list[CheckResult]:
    places = run.order or {nodeid: place for place, nodeid in enumerate(run.results)}
    found = sorted(run.results.items(), key=lambda item: places.get(item[0], 0))
    return sorted((r for _, r in found), key=lambda r: (r.checkpoint, checks.place_of(r.check)))


def _add_unreported(run: GateRun, selected: Callable[[], list[Checkpoint]]) -> None:
    """Add a not-run result for every check that no xdist worker reported."""
    unreported = {
        nodeid: check
        for nodeid in run.order
        if (check := check_of(nodeid))
        and (nodeid not in run.results or run.results[nodeid].verdict == PENDING)
    }
    if not unreported:
        return
    checkpoints = {checkpoint.id: checkpoint for checkpoint in selected()}
    ended_at = {group_of(nodeid): check_of(nodeid) for nodeid in run.crashed}
    for nodeid, check in unreported.items():
        if (checkpoint := checkpoints.get(group_of(nodeid))) is None:
            continue
        verdict = PENDING
        if (at := ended_at.get(checkpoint.id)) is not None:
            why = run.crashed.get(nodeid, f"its xdist worker crashed while judging {at}")
            verdict = not_run(why, RERUN_CRASHED)
        run.results[nodeid] = CheckResult(
            checkpoint.id,
            run.schemes[checkpoint.id],
            check,
            verdict,
            task=checkpoint.task,
            base=checkpoint.base,
        )


def _uphold(config: pytest.Config, run: GateRun) -> None:
    """Apply Holm's adjustment to failures among several statistical checks, in reports too."""
    before = run.results
    run.results = dict(zip(before, upheld(list(before.values())), strict=True))
    reporter: Any = config.pluginmanager.get_plugin("terminalreporter")
    for report in reporter.stats.get("failed", []) if reporter else ():
        if (result := run.results.get(report.nodeid)) not in (None, before.get(report.nodeid)):
            report.longrepr = result.verdict.message(f"{result.checkpoint} {result.check}")


def remove_results(config: pytest.Config) -> None:
    """Remove what an earlier run of this shard left: if this one ends early, it is missing."""
    run = config.stash[RUN]
    is_controller = not hasattr(config, "workerinput")
    if run.shard and is_controller and (directory := report_directory(config)):
        (directory / RESULTS).unlink(missing_ok=True)


def finish(
    session: pytest.Session, exitstatus: int, selected: Callable[[], list[Checkpoint]]
) -> None:
    """Write the report; the exit status is 0 only if every check passed.

    `selected` gives the selected checkpoints.
    """
    run = session.config.stash.get(RUN, None)
    if run is None or session.config.option.collectonly:
        return
    if not (run.results or run.crashed or run.has_nothing_to_judge or run.refused):
        return
    if hasattr(session.config, "workerinput"):  # an xdist worker; its controller reports
        send(session.config, run)
        return
    if run.refused:
        return
    DiskCache(cache_directory(session.config)).forget_unused()
    _add_unreported(run, selected)
    _uphold(session.config, run)
    run.finished = finished = _finished(run)
    if exitstatus == pytest.ExitCode.OK and not finished.released:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
    if directory := report_directory(session.config):
        write_reports(finished, directory)


def settle_status(session: pytest.Session) -> None:
    """Let a shard without a checkpoint exit with 0, and bad input that a worker found with 4.

    Called last, because syrupy sets pytest's own status again.
    """
    run = session.config.stash.get(RUN, None)
    if run is not None and run.refused and not hasattr(session.config, "workerinput"):
        session.exitstatus = pytest.ExitCode.USAGE_ERROR
    nothing = session.exitstatus == pytest.ExitCode.NO_TESTS_COLLECTED
    if run is not None and run.has_nothing_to_judge and nothing:
        session.exitstatus = pytest.ExitCode.OK


def _finished(run: GateRun) -> Run:
    started = datetime.datetime.fromtimestamp(run.started, datetime.UTC)
    return Run(
        _in_order(run),
        started=started.isoformat(timespec="seconds"),
        duration_s=time.time() - run.started,
        environment={
            **library_versions(),
            "python": platform.python_version(),
            "machine": platform.machine(),
            "devices": ", ".join(environment.available_devices().values()),
        },
        tiers=run.tiers,
        left_out=run.left_out,
        notes=run.all_notes,
        engines=run.all_engines,
        histories=_histories(run),
        place_of=checks.place_of,
        shard=run.shard,
    )


def _histories(run: GateRun) -> dict[str, list[dict[str, Any]]]:
    judged = {result.checkpoint for result in run.results.values()}
    known = read_all_checkpoint_files(run.root).values()
    return {one.id: history_of(one) for one in known if one.golden and one.id in judged}


def summarize(terminalreporter: Any, config: pytest.Config) -> None:
    """Print the table of checks and the checks that were skipped."""
    run = config.stash[RUN]
    if run.refused:
        terminalreporter.write_line(f"ERROR: {run.refused}", red=True)
    if (finished := run.finished) is None:
        return
    terminalreporter.section("quantgate")
    terminal = terminalreporter._tw
    terminalreporter.write(summary(finished, width=terminal.fullwidth, color=terminal.hasmarkup))
    if directory := report_directory(config):
        names = ", ".join(f"{directory}/{name}" for name in FILES)
        terminalreporter.write_line(f"report: {names}")
    if os.environ.get("GITHUB_ACTIONS") == "true":
        workspace = Path(os.environ.get("GITHUB_WORKSPACE", config.rootpath))
        for line in workflow_commands(finished.results, config.rootpath, workspace):
            terminalreporter.write_line(line)
