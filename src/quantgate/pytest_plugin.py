"""The gate's pytest hooks. They only delegate to `quantgate.plugin`.

A test suite of your own imports what it needs from here:

    from quantgate.pytest_plugin import Deviation, Gate, Verdict

    def test_latency(gate: Gate) -> None:
        slowest = Deviation("slowest request", measured, 2.0, "s")
        gate.judge(Verdict("fail" if slowest.exceeded else "pass", "…", (slowest,)))
"""

from __future__ import annotations

import functools
import os
from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest

from quantgate.errors import BadInput
from quantgate.judging.verdict import Deviation, Verdict, not_run
from quantgate.measuring.environment import library_versions
from quantgate.measuring.reference_device import REFERENCE_DEVICES
from quantgate.plugin import reporting, selection
from quantgate.plugin.gate import Gate, gate, record
from quantgate.plugin.gate_run import RUN, GateRun
from quantgate.plugin.workers import ResultCollector, take_part
from quantgate.subject.tier import TIERS

__all__ = ["Deviation", "Gate", "Verdict", "gate", "not_run"]


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the gate's options."""
    group = parser.getgroup("quantgate", "release gate")
    group.addoption(
        "--checkpoint",
        action="append",
        metavar="PATH_OR_ID",
        help="gate this checkpoint: an id in fixtures/checkpoints, a directory or a hub id; "
        "may be repeated (default: every file in fixtures/checkpoints)",
    )
    group.addoption(
        "--base",
        metavar="PATH_OR_ID",
        help="the unquantized model that a --checkpoint given by path is compared with",
    )
    group.addoption(
        "--quick",
        action="store_true",
        help="judge only the checkpoints whose file says quick = true; see also --tier quick",
    )
    group.addoption(
        "--collection",
        default=".",
        metavar="NAME",
        help="judge the files in fixtures/checkpoints/NAME",
    )
    group.addoption(
        "--tier",
        choices=TIERS,
        help="how much to ask: quick (the serving dtype and 2,000 tokens), standard, or full "
        "(other engines and long contexts too); default: what each checkpoint's file asks, and "
        "standard if it has none",
    )
    group.addoption(
        "--probe",
        metavar="NAME_OR_FILE",
        help="score this probe: a name in fixtures/probes or a file (default: what the "
        "checkpoint's file says, or its task's embedded probe)",
    )
    group.addoption(
        "--shard",
        metavar="I/N",
        help="judge every N-th of the selected checkpoints, sorted by id, from the I-th on, into a "
        "directory of its own in that of the report; 'slurm' takes I and N from the job array's "
        "variables; `quantgate merge` makes one report of all shards",
    )
    group.addoption(
        "--gate-report",
        metavar="DIR",
        type=Path,
        help="write gate.json, junit.xml, gate.md and index.html into DIR",
    )
    group.addoption(
        "--gate-cache",
        metavar="DIR",
        type=Path,
        help="keep measurements of references and bases in DIR (default: .gate-cache)",
    )
    group.addoption(
        "--reference-device",
        choices=REFERENCE_DEVICES,
        help="compute references, and the heads' products of divergence, there "
        "(default: cuda where there is one)",
    )


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    """Register the marker and handle the options that do not depend on collection."""
    config.addinivalue_line(
        "markers",
        "gpu(count=1, memory_gib=0, capability=None): the check runs on CUDA, and needs as much",
    )
    if config.getoption("update_snapshots") or config.getoption("update_new_snapshots_only"):
        raise pytest.UsageError(
            "a test run never writes a golden; use "
            '`quantgate approve --checkpoint ID --reason "…"`.'
        )
    take_part(config)
    config.stash[RUN] = run = GateRun(config.rootpath)
    try:
        run.shard = selection.shard_of(config)
    except BadInput as error:
        raise pytest.UsageError(str(error)) from None
    reporting.remove_results(config)
    config.pluginmanager.register(ResultCollector(run))


def pytest_report_header(config: pytest.Config) -> list[str]:
    """Print versions and settings that verdicts depend on."""
    versions = ", ".join(f"{name} {value}" for name, value in library_versions().items())
    settings = [f"{k}={v}" for k, v in sorted(os.environ.items()) if k.startswith("QUANTGATE_")]
    shard = config.stash[RUN].shard
    said = [f"quantgate: {shard} (--shard {config.getoption('shard')})"] if shard else []
    return [f"quantgate: {versions}", *settings, *said]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Parametrize the suites over checkpoints, devices and precisions."""
    selection.parametrize(metafunc)


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Deselect checks that this machine or checkpoint cannot run, and record the reason."""
    selection.select(config, items)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Record a result for every selected check, even if its test errors out."""
    report = yield
    record(item, call, report)
    return report


@pytest.hookimpl(wrapper=True)
def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> Generator[None]:
    """Write the report, before other plugins end; the exit status is 0 only if all passed."""
    selected = functools.partial(selection.selected_checkpoints, session.config)
    reporting.finish(session, exitstatus, selected)
    yield
    reporting.settle_status(session)


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    """Print the table of checks and the checks that were skipped."""
    reporting.summarize(terminalreporter, config)
