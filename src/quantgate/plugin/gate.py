"""The `gate` fixture of the suites: it runs a check and records its verdict."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import pytest

from quantgate.errors import BadInput, printable
from quantgate.judging import checks, noise
from quantgate.judging.checks import Asked
from quantgate.judging.golden import since_golden, stored_dtype
from quantgate.judging.next_step import next_step
from quantgate.judging.verdict import Verdict, not_run
from quantgate.measuring.cache import DiskCache
from quantgate.measuring.case import Case
from quantgate.measuring.engine import lacking
from quantgate.measuring.engine_failure import EngineFailure
from quantgate.measuring.lab import Lab
from quantgate.measuring.ledger import Ledger
from quantgate.measuring.precision import SERVING
from quantgate.plugin.gate_run import PENDING, RUN, GateRun, cache_directory, params_of
from quantgate.subject.checkpoint import Checkpoint
from quantgate.subject.probe import Probe, stored_probe

if TYPE_CHECKING:
    from syrupy.assertion import SnapshotAssertion


@dataclass(frozen=True)
class Gate:
    """The value of the `gate` fixture: runs one test's check and records its verdict."""

    run: GateRun
    lab: Lab
    item: pytest.Item
    snapshot: Callable[[], SnapshotAssertion]

    @property
    def check(self) -> str:
        """The check's name, e.g. "drift-float32"."""
        return self.run.results[self.item.nodeid].check

    def ask(self) -> None:
        """Run this test's check, one of `checks.CHECKS`; fail the test unless it passes."""
        __tracebackhide__ = True
        check = checks.named(self.check)
        assert check is not None, f"there is no check '{self.check}'; give judge() a verdict"
        params = params_of(self.item)
        case = Case.of(params["checkpoint"], params.get("dtype", SERVING), self.lab)
        self.judge(check.judge(Asked(case, self.snapshot, self.check)))

    def judge(self, verdict: Verdict) -> None:
        """Record the verdict of this check, and fail the test unless it is a pass.

        A known failure is reported as an expected failure and does not count. If the check passes
        instead, the test fails, so that outdated entries are removed.
        """
        __tracebackhide__ = True
        result = self.run.results[self.item.nodeid]
        checkpoint: Checkpoint = params_of(self.item)["checkpoint"]
        verdict = replace(verdict, detail=printable(verdict.detail))
        verdict = self._completed(verdict, checkpoint)
        known = checkpoint.known_failure_of(result.check, verdict.kernels.values())
        if known is not None and verdict.outcome == "fail":
            verdict = replace(verdict, known_failure=f"{known.reason} ({known.issue})")
        elif known is not None and known.strict and verdict.outcome == "pass":
            verdict = replace(
                verdict,
                outcome="fail",
                detail=f"it passes, but is listed as a known failure: {known.reason}",
                next_step=f"remove [[known_failure]] '{known.check}' from its file",
            )
        scored = self.lab.scored_of(checkpoint)
        self.run.results[self.item.nodeid] = replace(result, verdict=verdict, probes=scored)
        message = verdict.message(f"{result.checkpoint} {result.check}")
        if verdict.known_failure:
            pytest.xfail(f"known failure: {verdict.known_failure}\n{message}")
        if verdict.outcome != "pass":
            pytest.fail(message, pytrace=False)

    def _completed(self, verdict: Verdict, checkpoint: Checkpoint) -> Verdict:
        """Add the noise floor, the changes since the golden, and the next step to a verdict."""
        if verdict.dtype is None:
            return verdict
        case = Case.of(checkpoint, verdict.dtype, self.lab)
        if self.lab.tier_of(checkpoint) != "quick":  # floors take as long as all of its checks
            verdict = noise.beside(verdict, lambda: noise.floor_of(case))
        changed = since_golden(checkpoint, case.engine.provenance)
        verdict = replace(verdict, since_golden=changed or "")
        if verdict.outcome == "pass":
            return verdict
        step = verdict.next_step or next_step(checks.named(self.check), verdict, checkpoint)
        return replace(verdict, next_step=step)


@pytest.fixture
def gate(request: pytest.FixtureRequest, checkpoint: Checkpoint, device: str) -> Gate:
    """The gate for one check."""
    run = request.config.stash[RUN]
    if run.lab is None:
        announce = _announcer(request.config)
        cache = DiskCache(cache_directory(request.config))
        run.lab = Lab(
            functools.partial(stored_probe, named=request.config.getoption("probe")),
            Ledger(announce, cache, notes=lacking()),
            tier=request.config.getoption("tier"),
            reference_device=request.config.getoption("reference_device"),
            served_again=_served_again(run),
        )
        for note in run.lab.ledger.notes:
            announce(note)
    run.lab.forget_others(checkpoint)  # a checkpoint's checks run consecutively
    return Gate(run, run.lab, request.node, lambda: request.getfixturevalue("snapshot"))


def record(item: pytest.Item, call: pytest.CallInfo[None], report: pytest.TestReport) -> None:
    """Record a selected check's result, even if its test errored out, and clean its report."""
    run = item.config.stash[RUN]
    if (result := run.results.get(item.nodeid)) is None:
        return
    error = call.excinfo.value if call.excinfo else None
    if foreseen := isinstance(error, BadInput | EngineFailure):
        report.longrepr = str(error)
    elif report.failed:
        report.longrepr = _printable_lines(report.longreprtext)
    # A check with a message of its own needs no captured output, and the thousands of lines that
    # libraries log at DEBUG would bury even a traceback.
    quiet = foreseen or result.verdict != PENDING
    report.sections = [] if quiet else [s for s in report.sections if "Captured log" not in s[0]]
    if result.verdict == PENDING and not report.passed:
        reason = str(error) if error else report.outcome
        result = replace(result, verdict=not_run(reason))
    result = replace(result, seconds=result.seconds + report.duration)
    run.results[item.nodeid] = result
    report.quantgate = result.to_dict()  # type: ignore[attr-defined]


def _printable_lines(text: str) -> str:
    """Return a traceback without control characters, which may come from a checkpoint."""
    return "\n".join(printable(line.expandtabs()) for line in text.splitlines())


def _served_again(run: GateRun) -> Callable[[Case], list[Probe]]:
    """Return a function that tells which probes the selected checks need rerun."""
    selected: dict[str, set[str]] = {}
    for result in run.results.values():
        selected.setdefault(result.checkpoint, set()).add(result.check)

    def probes(case: Case) -> list[Probe]:
        asked = selected[case.checkpoint.id]
        if any(_is_moved_by_noise(check) for check in asked) and (
            found := noise.served_again(case)
        ):
            return found
        if f"invariance-{stored_dtype(case.dtype)}" in asked:
            return [case.mixed[0]]
        return []

    return probes


def _is_moved_by_noise(name: str) -> bool:
    check = checks.named(name)
    return check is None or check.moved_by_noise


def _announcer(config: pytest.Config) -> Callable[[str], None]:
    """Return a function that prints a line of progress despite pytest's output capturing."""
    reporter: Any = config.pluginmanager.get_plugin("terminalreporter")
    capture: Any = config.pluginmanager.get_plugin("capturemanager")

    def announce(text: str) -> None:
        if reporter is None or reporter.verbosity < 0:  # an xdist worker, or -q
            return
        with capture.global_and_fixture_disabled():
            reporter.ensure_newline()
            reporter.write_line(f"  {text}", light=True)

    return announce
