"""Select the checks of a run by checkpoint and device, and record why others are skipped."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from quantgate.errors import BadInput
from quantgate.judging import checks
from quantgate.judging.golden import unclaimed
from quantgate.judging.invariance import other_parallel_size
from quantgate.judging.results import CheckResult
from quantgate.measuring import environment
from quantgate.measuring.precision import why_no_float32
from quantgate.measuring.reference_device import choose_device
from quantgate.plugin import devices
from quantgate.plugin.gate_run import PENDING, RUN, GateRun, is_check, params_of, subject_of
from quantgate.plugin.scheduling import check_of
from quantgate.reporting.shard import Shard, parse_shard
from quantgate.subject.checkpoint import Checkpoint
from quantgate.subject.checkpoint_file import (
    read_all_checkpoint_files,
    verify,
    with_own_task,
)
from quantgate.subject.files import actual_scheme, context_length
from quantgate.subject.probe import stored_probe
from quantgate.subject.selected import Selection, selected
from quantgate.subject.task import GENERATE
from quantgate.subject.tier import RunTier, Tier, covers
from quantgate.subject.windows import LONG_CONTEXT, long_contexts

if TYPE_CHECKING:
    from quantgate.judging.checks import Need

DEVICES = ("cpu", "cuda")
OTHER_ENGINES = ("tensor-parallel", "compiled")
# The options that decide what is asked of a checkpoint, by pytest's names for them.
ASKED = {
    "--tier": "tier",
    "--probe": "probe",
    "--quick": "quick",
    "--base": "base",
    "-k": "keyword",
    "-m": "markexpr",
}


def parametrize(metafunc: pytest.Metafunc) -> None:
    """Parametrize a test over checkpoints, devices and the check's precisions."""
    if "checkpoint" not in metafunc.fixturenames:
        return
    checkpoints = selected_checkpoints(metafunc.config)
    if (check := checks.of_test(metafunc.function.__name__)) is not None:
        checkpoints = [one for one in checkpoints if one.task in check.tasks]
    metafunc.parametrize("checkpoint", checkpoints, ids=lambda checkpoint: checkpoint.id)
    gpu = pytest.mark.gpu(count=1)
    metafunc.parametrize(
        "device", [pytest.param(name, marks=gpu if name == "cuda" else ()) for name in DEVICES]
    )
    if check is not None and check.precisions and "dtype" in metafunc.fixturenames:
        metafunc.parametrize("dtype", check.precisions)


def selected_checkpoints(config: pytest.Config) -> list[Checkpoint]:
    """Return the checkpoints that the options select; errors are raised after collection."""
    run = config.stash[RUN]
    if run.checkpoints is None:
        run.checkpoints = []
        try:
            run.checkpoints = _read_checkpoints(config, run)
        except BadInput as error:
            run.problem = str(error)
    return run.checkpoints


def shard_of(config: pytest.Config) -> Shard | None:
    """Return the part of the selection that `--shard` names; None without that option."""
    if (text := config.getoption("shard")) is None:
        return None
    number, of = parse_shard(text, os.environ)
    wanted = _wanted(config, read_all_checkpoint_files(config.rootpath), config.rootpath)
    given = {name: config.getoption(option) for name, option in ASKED.items()}
    asked = {name: str(value) for name, value in given.items() if value}
    return Shard(number, of, tuple(sorted(checkpoint.id for checkpoint in wanted)), asked)


def _read_checkpoints(config: pytest.Config, run: GateRun) -> list[Checkpoint]:
    choose_device(config.getoption("reference_device"))  # fail now rather than an hour later
    known = read_all_checkpoint_files(run.root)
    wanted = _wanted(config, known, run.root)
    if run.shard is not None:
        wanted = [checkpoint for checkpoint in wanted if checkpoint.id in run.shard.own]
    if not config.getoption("checkpoint") and (orphans := unclaimed(run.root, known)):
        raise BadInput(
            f"{orphans[0]}: no checkpoint file claims this golden; remove it (git rm), or add the "
            "file."
        )
    wanted = [c if c.id in known else with_own_task(c) for c in wanted]
    worker = getattr(config, "workerinput", {})
    workers = worker.get("workercount", 1)
    for checkpoint in wanted:
        checks.require_known(checkpoint)
        if workers > 1 and (owned := devices.gpus()):
            needed = checkpoint.engine.tensor_parallel_size
            devices.require_gpus(checkpoint.id, needed, len(owned), workers)
        if shared := worker.get(devices.SHARED_GPUS):
            devices.require_fixed_cache(checkpoint, workers, shared)
        verify(checkpoint)
        run.schemes[checkpoint.id] = actual_scheme(checkpoint.directory)
        if checkpoint.base_checkpoint is not None:
            verify(checkpoint.base_checkpoint)
    return wanted


def _wanted(config: pytest.Config, known: Mapping[str, Checkpoint], root: Path) -> list[Checkpoint]:
    """Return the checkpoints that the options select; never an empty list."""
    selection = Selection(
        names=config.getoption("checkpoint") or (),
        base=config.getoption("base"),
        quick=config.getoption("quick"),
        collection=config.getoption("collection"),
    )
    return selected(selection, known, root)


def select(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Deselect checks that this machine or checkpoint cannot run; refuse an empty selection.

    An xdist worker refuses by running nothing, and its controller says why: a worker's exception
    while it collects ends the run in an internal error of xdist.
    """
    try:
        _select(config, items)
    except pytest.UsageError as error:
        if not hasattr(config, "workerinput"):
            raise
        config.stash[RUN].refused = str(error)
        items.clear()


def _select(config: pytest.Config, items: list[pytest.Item]) -> None:
    run = config.stash[RUN]
    if run.problem is not None:
        raise pytest.UsageError(run.problem)
    # Drop tests for whose task there is no checkpoint.
    items[:] = [item for item in items if params_of(item) or not is_check(item)]
    judged = [item for item in items if params_of(item)]
    if not judged:
        if run.has_nothing_to_judge:
            return
        if run.checkpoints is not None and not items:
            raise pytest.UsageError(
                f"no check is selected: -k '{config.option.keyword}' and -m "
                f"'{config.option.markexpr}' leave none; `pytest --co` lists them."
            )
        return
    available = environment.available_devices()
    quick = config.getoption("quick")
    reasons = {
        item: _why_not_in_tier(item)
        or _why_left_out(item, available)
        or (_why_not_quick(item) if quick else None)
        for item in judged
    }
    runnable = [item for item in judged if reasons[item] is None]
    if not runnable:
        why = "; ".join(sorted({str(reason) for reason in reasons.values()}))
        raise pytest.UsageError(f"all {len(judged)} selected checks are skipped: {why}.")
    dropped = [item for item in judged if reasons[item] is not None]
    items[:] = [item for item in items if reasons.get(item) is None]
    _keep_together(items)
    config.hook.pytest_deselected(items=dropped)
    run.left_out = [(subject_of(item), str(reasons[item])) for item in dropped]
    for item in runnable:
        checkpoint: Checkpoint = params_of(item)["checkpoint"]
        tier = _tier_of(item)
        # One without a file requires no more than is asked.
        run.tiers[checkpoint.id] = RunTier(tier, checkpoint.tier if checkpoint.file else tier)
        run.results[item.nodeid] = CheckResult(
            checkpoint.id,
            run.schemes[checkpoint.id],
            check_of(item.nodeid) or item.name,
            PENDING,
            task=checkpoint.task,
            base=checkpoint.base,
        )


def _keep_together(items: list[pytest.Item]) -> None:
    """Sort a checkpoint's checks together, because they share its measurements.

    Checkpoints that need extra engines come first: at the end they would keep one xdist worker busy
    while the others are idle.
    """

    def place(item: pytest.Item) -> tuple[bool, str]:
        checkpoint = params_of(item).get("checkpoint")
        return not getattr(checkpoint, "invariance", ()), getattr(checkpoint, "id", "")

    items.sort(key=place)


def _why_not_quick(item: pytest.Item) -> str | None:
    check = check_of(item.nodeid)
    checkpoint: Checkpoint = params_of(item)["checkpoint"]
    return f"its file leaves {check} out of --quick" if check in checkpoint.not_quick else None


def _tier_of(item: pytest.Item) -> Tier:
    tier: Tier = item.config.getoption("tier") or params_of(item)["checkpoint"].tier
    return tier


def _why_not_in_tier(item: pytest.Item) -> str | None:
    """Return why a check is not asked in the tier that is run; None if it is."""
    tier = _tier_of(item)
    if (check := checks.named(check_of(item.nodeid) or "")) is None:
        return None
    if not covers(tier, check.tier):
        return f"--tier {check.tier} asks it, and this is tier {tier}"
    if tier == "quick" and params_of(item).get("dtype") == "float32":
        return "--tier standard asks it in float32 too, and this is tier quick"
    return None


def _why_left_out(item: pytest.Item, available: dict[str, str]) -> str | None:
    params = params_of(item)
    checkpoint: Checkpoint = params["checkpoint"]
    if params["device"] not in available:
        return (
            "it needs a GPU and this machine has none"
            if params["device"] == "cuda"
            else "the installed vLLM runs on CUDA, not on the CPU"
        )
    if params.get("dtype") == "float32" and (why := why_no_float32(checkpoint)):
        return why
    check = checks.named(check_of(item.nodeid) or "")
    needs = () if check is None else check.needs
    return next(filter(None, (_why_lacking(need, item) for need in needs)), None)


def _why_lacking(need: Need, item: pytest.Item) -> str | None:
    """Return why a checkpoint or its probe lacks something that a check needs, or None."""
    checkpoint: Checkpoint = params_of(item)["checkpoint"]
    if need == "base" and checkpoint.base is None:
        return "no base is named; give --base, or base in its file"
    if need == "golden" and not checkpoint.golden:
        return (
            "it has no golden: given by path, or golden = false in its file (give it a file in "
            "fixtures/checkpoints, then run `quantgate approve --checkpoint ID`)"
        )
    if need == "step_tag" and checkpoint.step_tag_id is None:
        return "its file has no step_tag_id"
    if need == "metric" and checkpoint.task != GENERATE and not checkpoint.has_own_metric:
        return "its embeddings have no task metric; judge the model's quality as task 'generate'"
    if need == "long contexts":
        probe = stored_probe(checkpoint, named=item.config.getoption("probe"))
        most = context_length(checkpoint.directory)
        if long_contexts(probe, most) is None:
            context = f", and the model takes {most:,}" if most else ""
            return f"no window of its probe has more than {LONG_CONTEXT:,} tokens{context}"
    if need in OTHER_ENGINES:
        return _why_no_other_engine(need, item)
    return None


def _why_no_other_engine(need: Need, item: pytest.Item) -> str | None:
    """Return why no engine with other settings is started, or None if one is."""
    checkpoint: Checkpoint = params_of(item)["checkpoint"]
    if need not in checkpoint.invariance and _tier_of(item) != "full":
        return f"its file does not ask for it (add '{need}' to invariance)"
    if need == "tensor-parallel" and params_of(item)["device"] == "cuda":
        needed, there = other_parallel_size(checkpoint), len(devices.gpus())
        if there < needed:
            return f"it needs {needed} GPUs, and {there} can be used here"
    return None
