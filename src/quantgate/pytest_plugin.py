"""The gate as a pytest plugin: options, parametrization, fixtures, reports. Thin on purpose."""

from __future__ import annotations

import datetime
import itertools
import os
import platform
import time
from collections import Counter
from collections.abc import Callable, Generator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from quantgate import checks, devices, engine, noise
from quantgate.cache import DiskCache
from quantgate.checkpoint import (
    BadInput,
    Checkpoint,
    actual_scheme,
    find_checkpoint,
    read_checkpoint_files,
    verify,
    with_own_task,
)
from quantgate.checks import Asked, Need
from quantgate.engine import EngineLife, available_devices, lacking, library_versions
from quantgate.engine_failure import EngineFailure
from quantgate.golden import history_of, since_golden, stored_dtype, unclaimed
from quantgate.invariance import other_parallel_size
from quantgate.next_step import next_step
from quantgate.probe import Probe, embedded_probe
from quantgate.reference_device import REFERENCE_DEVICES, choose_device
from quantgate.report.results import CheckResult, overall, upheld
from quantgate.report.run import Run
from quantgate.report.terminal import engines_line, table
from quantgate.report.write import FILES, write_reports
from quantgate.scheduling import check_of, group_of
from quantgate.serving import mixed
from quantgate.sources import SERVING, Sources, has_float32
from quantgate.task import GENERATE, Task
from quantgate.verdict import Verdict, not_run, printable

if TYPE_CHECKING:
    from syrupy.assertion import SnapshotAssertion

DEVICES = ("cpu", "cuda")
OTHER_ENGINES = ("tensor-parallel", "compiled")
DEFAULT_CACHE = Path(".gate-cache")
# What the widest table needs; a narrower terminal wraps its lines, which loses nothing.
TABLE_WIDTH = 176


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
        help="judge only the checkpoints whose file says quick = true",
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


@dataclass
class GateRun:
    """What one pytest session knows of its gate run."""

    root: Path
    started: float = field(default_factory=time.time)
    engines_before: int = field(default_factory=lambda: len(engine.LIVES))
    checkpoints: list[Checkpoint] | None = None
    """The selected ones, once a suite was collected."""
    schemes: dict[str, str] = field(default_factory=dict)
    problem: str | None = None
    """Why nothing can be judged: raised once collection is over."""
    left_out: list[tuple[str, str]] = field(default_factory=list)
    """Subject and reason."""
    results: dict[str, CheckResult] = field(default_factory=dict)
    """By node id: "not-run" for every selected check, until its test has judged it."""
    sources: Sources | None = None
    order: dict[str, int] = field(default_factory=dict)
    """Where each check stands in xdist's workers' collection: results come as they are ready."""
    crashed: dict[str, str] = field(default_factory=dict)
    """What xdist says of each check that a worker did not survive."""
    places: dict[str, int] = field(default_factory=dict)
    """Which part of the machine each of xdist's workers has: a crashed one's goes to its heir."""
    notes: list[str] = field(default_factory=list)
    """What xdist's workers want its reader to know."""
    engines: list[EngineLife] = field(default_factory=list)
    """Those that xdist's workers started."""

    @property
    def all_notes(self) -> list[str]:
        """What the run's reader must know, wherever it was measured."""
        return [*self.notes, *(self.sources.notes if self.sources else ())]

    @property
    def all_engines(self) -> list[EngineLife]:
        """The engines that were started, in whichever process."""
        return [*self.engines, *engine.LIVES[self.engines_before :]]


RUN = pytest.StashKey[GateRun]()
WORKER = "quantgate"
PLACE = "quantgate_place"
PENDING = not_run("the run ended before its test")
RERUN_CRASHED = "`dmesg` says whether it was killed for want of memory; run it again without -n"


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    """Register the markers and take the options that need no collection."""
    config.addinivalue_line(
        "markers",
        "gpu(count=1, memory_gib=0, capability=None): the check runs on CUDA, and needs as much",
    )
    if config.getoption("update_snapshots") or config.getoption("update_new_snapshots_only"):
        raise pytest.UsageError(
            "a test run never writes a golden; use "
            '`python tools/regen_golden.py --checkpoint ID --reason "…"`.'
        )
    if (worker := getattr(config, "workerinput", None)) is not None:
        _share_processors(worker["workercount"])
        _own_gpus(worker[PLACE], worker["workercount"])
    config.stash[RUN] = GateRun(config.rootpath)
    config.pluginmanager.register(ResultCollector(config.stash[RUN]))


def _share_processors(workers: int) -> None:
    """Leave each xdist worker its part of the processors: vLLM would bind every one to the same."""
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    threads = max(1, len(os.sched_getaffinity(0)) // workers)
    os.environ.setdefault("OMP_NUM_THREADS", str(threads))


def _own_gpus(place: int, workers: int) -> None:
    """Leave each xdist worker GPUs of its own."""
    try:
        if owned := devices.share(place, workers, devices.gpus()):
            os.environ[devices.VISIBLE] = ",".join(owned)
    except BadInput as error:
        raise pytest.UsageError(str(error)) from None


def pytest_report_header(config: pytest.Config) -> list[str]:
    """Print what the verdicts depend on."""
    versions = ", ".join(f"{name} {value}" for name, value in library_versions().items())
    settings = [f"{k}={v}" for k, v in sorted(os.environ.items()) if k.startswith("QUANTGATE_")]
    return [f"quantgate: {versions}", *settings]


# Selection ---------------------------------------------------------------------------------------


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Parametrize the suites over checkpoints and devices: the one place that does."""
    if "checkpoint" not in metafunc.fixturenames:
        return
    checkpoints = _selected_checkpoints(metafunc.config)
    if (check := checks.of_test(metafunc.function.__name__)) is not None:
        checkpoints = [one for one in checkpoints if one.task in check.tasks]
    metafunc.parametrize("checkpoint", checkpoints, ids=lambda checkpoint: checkpoint.id)
    gpu = pytest.mark.gpu(count=1)
    metafunc.parametrize(
        "device", [pytest.param(name, marks=gpu if name == "cuda" else ()) for name in DEVICES]
    )
    if check is not None and check.precisions and "dtype" in metafunc.fixturenames:
        metafunc.parametrize("dtype", check.precisions)


def _selected_checkpoints(config: pytest.Config) -> list[Checkpoint]:
    run = config.stash[RUN]
    if run.checkpoints is None:
        run.checkpoints = []
        try:
            run.checkpoints = _read_checkpoints(config, run)
        except BadInput as error:
            run.problem = str(error)
    return run.checkpoints


def _read_checkpoints(config: pytest.Config, run: GateRun) -> list[Checkpoint]:
    choose_device(config.getoption("reference_device"))  # refused now, not an hour later
    known = read_checkpoint_files(run.root)
    names, base = config.getoption("checkpoint"), config.getoption("base")
    if base is not None and not names:
        raise BadInput("--base goes with --checkpoint PATH; checkpoint files name their own base.")
    quick = config.getoption("quick")
    if quick and names:
        raise BadInput("--quick goes without --checkpoint: the files say which ones are quick.")
    wanted = (
        [find_checkpoint(name, known, run.root, base) for name in dict.fromkeys(names)]
        if names
        else [checkpoint for checkpoint in known.values() if checkpoint.quick or not quick]
    )
    if not wanted and quick and known:
        raise BadInput(
            f"--quick: none of the {len(known)} files in {run.root / 'fixtures' / 'checkpoints'} "
            "says quick = true."
        )
    if not wanted:
        raise BadInput(
            f"{run.root / 'fixtures' / 'checkpoints'}: no checkpoint file there, so there is "
            "nothing to judge; add one or give --checkpoint PATH."
        )
    if not names and (orphans := unclaimed(run.root, known)):
        raise BadInput(
            f"{orphans[0]}: no checkpoint file claims this golden; remove it (git rm), or add the "
            "file."
        )
    repeated = [name for name, count in Counter(c.id for c in wanted).items() if count > 1]
    if repeated:
        raise BadInput(
            f"--checkpoint: two of them would be called '{repeated[0]}'; give each directory its "
            "own name, or gate them one by one."
        )
    wanted = [c if c.id in known else with_own_task(c) for c in wanted]
    for checkpoint in wanted:
        checks.require_known(checkpoint)
    workers = getattr(config, "workerinput", {}).get("workercount", 1)
    for checkpoint in wanted:
        if workers > 1 and (owned := devices.gpus()):
            needed = checkpoint.engine.tensor_parallel_size
            devices.require_gpus(checkpoint.id, needed, len(owned), workers)
        verify(checkpoint)
        run.schemes[checkpoint.id] = actual_scheme(checkpoint.directory)
        if checkpoint.base_checkpoint is not None:
            verify(checkpoint.base_checkpoint)
    return wanted


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out what this machine or a checkpoint cannot have, and say so; refuse an empty rest."""
    run = config.stash[RUN]
    if run.problem is not None:
        raise pytest.UsageError(run.problem)
    # A suite without a checkpoint that does its task has nothing to say.
    items[:] = [item for item in items if _params(item) or not _is_check(item)]
    checks = [item for item in items if _params(item)]
    if not checks:
        if run.checkpoints is not None and not items:
            raise pytest.UsageError(
                f"no check is selected: -k '{config.option.keyword}' and -m "
                f"'{config.option.markexpr}' leave none; `pytest --co` lists them."
            )
        return
    available = available_devices()
    quick = config.getoption("quick")
    reasons = {
        item: _why_left_out(item, available) or (_why_not_quick(item) if quick else None)
        for item in checks
    }
    runnable = [item for item in checks if reasons[item] is None]
    if not runnable:
        why = "; ".join(sorted({str(reason) for reason in reasons.values()}))
        raise pytest.UsageError(f"all {len(checks)} selected checks are left out: {why}.")
    dropped = [item for item in checks if reasons[item] is not None]
    items[:] = [item for item in items if reasons.get(item) is None]
    _keep_together(items)
    config.hook.pytest_deselected(items=dropped)
    run.left_out = [(_subject(item), str(reasons[item])) for item in dropped]
    for item in runnable:
        checkpoint = _params(item)["checkpoint"]
        run.results[item.nodeid] = CheckResult(
            checkpoint.id,
            run.schemes[checkpoint.id],
            check_of(item.nodeid) or item.name,
            PENDING,
            task=checkpoint.task,
        )


def _keep_together(items: list[pytest.Item]) -> None:
    """Let a checkpoint's checks follow one another: they share its measurements.

    Those with engines of their own for some checks come first: as the last ones they would keep one
    xdist worker busy while the others have nothing to do.
    """

    def place(item: pytest.Item) -> tuple[bool, str]:
        checkpoint = _params(item).get("checkpoint")
        return not getattr(checkpoint, "invariance", ()), getattr(checkpoint, "id", "")

    items.sort(key=place)


def _params(item: pytest.Item) -> dict[str, Any]:
    """Return a check's parameters; {} for a test that judges no checkpoint."""
    params = getattr(getattr(item, "callspec", None), "params", {})
    return params if isinstance(params.get("checkpoint"), Checkpoint) else {}


def _is_check(item: pytest.Item) -> bool:
    return "checkpoint" in getattr(getattr(item, "callspec", None), "params", {})


def _why_not_quick(item: pytest.Item) -> str | None:
    check = check_of(item.nodeid)
    checkpoint: Checkpoint = _params(item)["checkpoint"]
    return f"its file leaves {check} out of --quick" if check in checkpoint.not_quick else None


def _why_left_out(item: pytest.Item, available: dict[str, str]) -> str | None:
    params = _params(item)
    checkpoint: Checkpoint = params["checkpoint"]
    if params["device"] not in available:
        return (
            "it needs a GPU and this machine has none"
            if params["device"] == "cuda"
            else "the installed vLLM runs on CUDA, not on the CPU"
        )
    if params.get("dtype") == "float32" and not has_float32(checkpoint):
        return "vLLM's CUDA kernels of quantized linears compute in 16 bits, not in float32"
    check = checks.named(check_of(item.nodeid) or "")
    needs = () if check is None else check.needs
    reasons = (_why_lacking(need, checkpoint, params["device"]) for need in needs)
    return next(filter(None, reasons), None)


def _why_lacking(need: Need, checkpoint: Checkpoint, device: str) -> str | None:
    """Return why a checkpoint does not have what a check needs on a device; None where it has."""
    asked_for = need not in OTHER_ENGINES or need in checkpoint.invariance
    reasons: dict[Need, tuple[bool, str]] = {
        "base": (checkpoint.base is None, "no base is named; give --base, or base in its file"),
        "golden": (
            not checkpoint.golden,
            "it has no golden: given by path, or golden = false in its file",
        ),
        "step_tag": (checkpoint.step_tag_id is None, "no step_tag_id is in its file"),
        "metric": (
            checkpoint.task != GENERATE and not checkpoint.has_own_metric,
            "it generates, and is judged by its perplexity: its embeddings have no task",
        ),
    }
    lacks, reason = reasons.get(
        need, (not asked_for, f"its file does not ask for it: invariance = ['{need}']")
    )
    if lacks or need != "tensor-parallel" or device != "cuda":
        return reason if lacks else None
    needed, there = other_parallel_size(checkpoint), len(devices.gpus())
    return None if there >= needed else f"it needs {needed} GPUs, and {there} can be used here"


def _subject(item: pytest.Item) -> str:
    params = _params(item)
    return f"{params['checkpoint'].id} {check_of(item.nodeid)} on {params['device']}"


# Judging -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Gate:
    """What a suite's test holds: the sources, and the place where its verdict goes."""

    run: GateRun
    sources: Sources
    item: pytest.Item
    snapshot: Callable[[], SnapshotAssertion]

    @property
    def check(self) -> str:
        """The check's name, e.g. "drift-float32"."""
        return self.run.results[self.item.nodeid].check

    def ask(self) -> None:
        """Ask this test's check, one of `checks.CHECKS`, and fail unless it passes."""
        __tracebackhide__ = True
        check = checks.named(self.check)
        assert check is not None, f"there is no check '{self.check}'; give judge() a verdict"
        params = _params(self.item)
        self.judge(
            check.judge(
                Asked(
                    self.sources,
                    params["checkpoint"],
                    params.get("dtype", SERVING),
                    self.snapshot,
                    self.check,
                )
            )
        )

    def judge(self, verdict: Verdict) -> None:
        """Record the verdict of this check, and fail the test unless it is a pass.

        A known failure is an expected one: it is shown and does not count, and a pass in its place
        is a failure, so that no entry outlives what it is about.
        """
        __tracebackhide__ = True
        result = self.run.results[self.item.nodeid]
        checkpoint: Checkpoint = _params(self.item)["checkpoint"]
        verdict = replace(verdict, detail=printable(verdict.detail))
        verdict = self._completed(verdict, checkpoint)
        known = checkpoint.known_failure_of(result.check, on_processor=verdict.on_processor)
        if known is not None and verdict.outcome == "fail":
            verdict = replace(verdict, known_failure=f"{known.reason} ({known.issue})")
        elif known is not None and known.strict and verdict.outcome == "pass":
            verdict = replace(
                verdict,
                outcome="fail",
                detail=f"it passes, but is listed as a known failure: {known.reason}",
                next_step=f"remove [[known_failure]] '{known.check}' from its file",
            )
        self.run.results[self.item.nodeid] = replace(result, verdict=verdict)
        message = verdict.message(f"{result.checkpoint} {result.check}")
        if verdict.known_failure:
            pytest.xfail(f"known failure: {verdict.known_failure}\n{message}")
        if verdict.outcome != "pass":
            pytest.fail(message, pytrace=False)

    def _completed(self, verdict: Verdict, checkpoint: Checkpoint) -> Verdict:
        """Add what every check's verdict has: the noise floor, what changed since, what to do."""
        dtype = verdict.dtype
        if dtype is None:
            return verdict
        verdict = noise.beside(verdict, lambda: noise.floor_of(self.sources, checkpoint, dtype))
        changed = since_golden(checkpoint, self.sources.engine(checkpoint, dtype).provenance)
        verdict = replace(verdict, since_golden=changed or "")
        if verdict.outcome == "pass":
            return verdict
        step = verdict.next_step or next_step(self.check, verdict, checkpoint)
        return replace(verdict, next_step=step)


@pytest.fixture
def gate(request: pytest.FixtureRequest, checkpoint: Checkpoint, device: str) -> Gate:
    """The gate, for one check."""
    run = request.config.stash[RUN]
    if run.sources is None:
        cache = DiskCache(_cache_directory(request.config))
        announce = _announcer(request.config)
        run.sources = Sources(
            _probes(run.root),
            announce,
            cache,
            reference_device=request.config.getoption("reference_device"),
            notes=lacking(),
            served_again=_served_again(run),
        )
        for note in run.sources.notes:
            announce(note)
    run.sources.forget_others(checkpoint)  # they follow one another
    return Gate(run, run.sources, request.node, lambda: request.getfixturevalue("snapshot"))


def _cache_directory(config: pytest.Config) -> Path:
    found: Path = config.getoption("gate_cache") or config.rootpath / DEFAULT_CACHE
    return found


def _probes(root: Path) -> Callable[[Task, bool], Probe]:
    return lambda task, quality: embedded_probe(root, task, quality=quality)


def _served_again(run: GateRun) -> Callable[[Sources, Checkpoint, str], list[Probe]]:
    """Return what tells sources which probes the selected checks will have served again."""
    selected: dict[str, set[str]] = {}
    for result in run.results.values():
        selected.setdefault(result.checkpoint, set()).add(result.check)

    def probes(sources: Sources, checkpoint: Checkpoint, dtype: str) -> list[Probe]:
        checks = selected[checkpoint.id]
        if any(not check.startswith("replay") for check in checks) and (
            found := noise.served_again(sources, checkpoint, dtype)
        ):
            return found
        if f"invariance-{stored_dtype(dtype)}" in checks:
            return [mixed(sources.probe_of(checkpoint))[0]]
        return []

    return probes


def _announcer(config: pytest.Config) -> Callable[[str], None]:
    """Return a function that prints a line of progress past pytest's capturing."""
    reporter: Any = config.pluginmanager.get_plugin("terminalreporter")
    capture: Any = config.pluginmanager.get_plugin("capturemanager")

    def announce(text: str) -> None:
        if reporter is None or reporter.verbosity < 0:  # an xdist worker, or -q
            return
        with capture.global_and_fixture_disabled():
            reporter.ensure_newline()
            reporter.write_line(f"  {text}", light=True)

    return announce


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Give every selected check a result, whatever became of its test."""
    report = yield
    run = item.config.stash[RUN]
    if (result := run.results.get(item.nodeid)) is None:
        return report
    error = call.excinfo.value if call.excinfo else None
    if foreseen := isinstance(error, BadInput | EngineFailure):
        report.longrepr = str(error)
    elif report.failed:
        report.longrepr = _printable_lines(report.longreprtext)
    # A check that explains itself needs no captured output, and thousands of lines that libraries
    # log at DEBUG would bury even a traceback.
    quiet = foreseen or result.verdict != PENDING
    report.sections = [] if quiet else [s for s in report.sections if "Captured log" not in s[0]]
    if result.verdict == PENDING and not report.passed:
        reason = str(error) if error else report.outcome
        result = replace(result, verdict=not_run(reason))
    result = replace(result, seconds=result.seconds + report.duration)
    run.results[item.nodeid] = result
    report.quantgate = result.to_dict()  # type: ignore[attr-defined]
    return report


def _printable_lines(text: str) -> str:
    """Return a traceback without what a terminal would obey: a checkpoint's words may be in it."""
    return "\n".join(printable(line.expandtabs()) for line in text.splitlines())


@dataclass(frozen=True, eq=False)  # pluggy keeps plugins in sets: hashed by identity
class ResultCollector:
    """Takes the results that xdist workers send; without xdist they are there already."""

    run: GateRun

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Called by pytest in the process that reports, for every phase of every test."""
        if (values := getattr(report, "quantgate", None)) is not None:
            self.run.results[report.nodeid] = CheckResult.from_dict(values)
        elif report.failed and report.nodeid in self.run.order and check_of(report.nodeid):
            # xdist's own report, of a worker that crashed.
            self.run.crashed[report.nodeid] = printable(report.longreprtext)

    @pytest.hookimpl(optionalhook=True)
    def pytest_configure_node(self, node: Any) -> None:
        """Called by xdist before it starts a worker, also one in the place of a crashed one."""
        taken = set(self.run.places.values())
        place = next(i for i in itertools.count() if i not in taken)
        self.run.places[node.gateway.id] = node.workerinput[PLACE] = place

    @pytest.hookimpl(optionalhook=True)
    def pytest_xdist_make_scheduler(self, config: pytest.Config, log: Any) -> Any:
        """Called by xdist: keep a checkpoint on one worker, whatever loads the others."""
        from quantgate.scheduling import CheckpointScheduling

        return CheckpointScheduling(config, log)

    @pytest.hookimpl(optionalhook=True)
    def pytest_xdist_node_collection_finished(self, node: Any, ids: list[str]) -> None:
        """Called by xdist when a worker has collected: all of them the same, in one order."""
        self.run.order = {nodeid: place for place, nodeid in enumerate(ids)}

    @pytest.hookimpl(optionalhook=True)
    def pytest_testnodedown(self, node: Any) -> None:
        """Called by xdist when a worker has ended: all of them left out the same."""
        self.run.places.pop(node.gateway.id, None)
        said = getattr(node, "workeroutput", {}).get(WORKER, {})
        if "left_out" in said:  # a crashed worker says nothing
            self.run.left_out = [(subject, why) for subject, why in said["left_out"]]
        self.run.notes += [note for note in said.get("notes", ()) if note not in self.run.notes]
        self.run.engines += [EngineLife(*life) for life in said.get("engines", ())]


# Reporting ---------------------------------------------------------------------------------------


def _in_order(run: GateRun) -> list[CheckResult]:
    places = run.order or {nodeid: place for place, nodeid in enumerate(run.results)}
    found = sorted(run.results.items(), key=lambda item: places.get(item[0], 0))
    return sorted((r for _, r in found), key=lambda r: (r.checkpoint, checks.place_of(r.check)))


def _add_unreported(config: pytest.Config, run: GateRun) -> None:
    """Give every check that no xdist worker reported a result: one without is not a pass."""
    unreported = {
        nodeid: check
        for nodeid in run.order
        if (check := check_of(nodeid))
        and (nodeid not in run.results or run.results[nodeid].verdict == PENDING)
    }
    if not unreported:
        return
    checkpoints = {checkpoint.id: checkpoint for checkpoint in _selected_checkpoints(config)}
    ended_at = {group_of(nodeid): check_of(nodeid) for nodeid in run.crashed}
    for nodeid, check in unreported.items():
        if (checkpoint := checkpoints.get(group_of(nodeid))) is None:
            continue
        verdict = PENDING
        if (at := ended_at.get(checkpoint.id)) is not None:
            why = run.crashed.get(nodeid, f"its worker ended while it judged {at}")
            verdict = not_run(why, RERUN_CRASHED)
        run.results[nodeid] = CheckResult(
            checkpoint.id, run.schemes[checkpoint.id], check, verdict, task=checkpoint.task
        )


def _uphold(config: pytest.Config, run: GateRun) -> None:
    """Let no fail stand that is one of several statistical checks by chance, in its text either."""
    before = run.results
    run.results = dict(zip(before, upheld(list(before.values())), strict=True))
    reporter: Any = config.pluginmanager.get_plugin("terminalreporter")
    for report in reporter.stats.get("failed", []) if reporter else ():
        if (result := run.results.get(report.nodeid)) not in (None, before.get(report.nodeid)):
            report.longrepr = result.verdict.message(f"{result.checkpoint} {result.check}")


@pytest.hookimpl(tryfirst=True)
def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    """Write the report, and let nothing but a pass exit 0."""
    run = session.config.stash.get(RUN, None)
    if run is None or not (run.results or run.crashed) or session.config.option.collectonly:
        return
    if hasattr(session.config, "workerinput"):  # an xdist worker; its controller reports
        output: dict[str, Any] = session.config.workeroutput  # type: ignore[attr-defined]
        engines = [tuple(life) for life in run.all_engines]
        output[WORKER] = {"left_out": run.left_out, "notes": run.all_notes, "engines": engines}
        return
    DiskCache(_cache_directory(session.config)).forget_unused()
    _add_unreported(session.config, run)
    _uphold(session.config, run)
    results = _in_order(run)
    if exitstatus == pytest.ExitCode.OK and overall(results) != "pass":
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
    if directory := session.config.getoption("gate_report"):
        started = datetime.datetime.fromtimestamp(run.started, datetime.UTC)
        finished = Run(
            results,
            started=started.isoformat(timespec="seconds"),
            duration_s=time.time() - run.started,
            environment={
                **library_versions(),
                "python": platform.python_version(),
                "machine": platform.machine(),
                "devices": ", ".join(available_devices().values()),
            },
            left_out=run.left_out,
            notes=run.all_notes,
            engines=run.all_engines,
            histories=_histories(run),
        )
        write_reports(finished, directory)


def _histories(run: GateRun) -> dict[str, list[dict[str, Any]]]:
    judged = {result.checkpoint for result in run.results.values()}
    known = read_checkpoint_files(run.root).values()
    return {one.id: history_of(one) for one in known if one.golden and one.id in judged}


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    """Print the table of checks, and what was left out."""
    run = config.stash[RUN]
    if not run.results or config.option.collectonly:
        return
    terminalreporter.section("quantgate")
    results = _in_order(run)
    width = max(terminalreporter._tw.fullwidth, TABLE_WIDTH)
    terminalreporter.write(table(results, width=width, color=terminalreporter._tw.hasmarkup))
    for reason, count in Counter(reason for _, reason in run.left_out).items():
        first = next(subject for subject, why in run.left_out if why == reason)
        others = f" and {count - 1} more" if count > 1 else ""
        terminalreporter.write_line(f"left out: {first}{others}: {reason}")
    for note in run.all_notes:
        terminalreporter.write_line(printable(f"note: {note}"))
    if run.all_engines:
        terminalreporter.write_line(engines_line(run.all_engines))
    if directory := config.getoption("gate_report"):
        names = ", ".join(f"{directory}/{name}" for name in FILES)
        terminalreporter.write_line(f"report: {names}")
