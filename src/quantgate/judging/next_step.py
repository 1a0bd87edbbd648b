"""What to do next when a check does not pass: one line, with a command if there is one."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from quantgate.judging.checks import Check, Remedy
    from quantgate.judging.verdict import Verdict
    from quantgate.subject.checkpoint import Checkpoint

_WHICH_MODULE = "which module it is: {pytest} -k replay"
_OTHERWISE = (
    "change kernels, enforce_eager or kv_cache_dtype in [engine], and try again: {pytest} -k "
    '"{family}"'
)
_COST = "if this cost is meant, give [budget.quality] a margin and a reason in {file}"
_FAULT = (
    "do not raise the margin: a loss of more than {times} times it is a fault, not the cost of "
    "quantization; compare tokenizer, config.json and scales with the base's, and see {pytest} -k "
    '"fidelity or replay"'
)
_MORE = "more documents in the probe decide it; tools/sequential_quality.py takes any text"
_EXPORT = "export the checkpoint again with its base's head and config.json: docs/pooling.md"

# A loss of more than this many times its margin is not the ordinary cost of such a quantization.
FAR_BEYOND = 10

_STEPS: Mapping[Remedy, str] = {
    "find the module": _WHICH_MODULE,
    "change the settings": _OTHERWISE,
    "weigh the cost": _COST,
    "export again": _EXPORT,
    "": "",
}


def next_step(check: Check | None, verdict: Verdict, checkpoint: Checkpoint) -> str:
    """Return what to do about a check that did not pass; "" for a project's own check."""
    if check is None:
        return ""
    step = _STEPS[check.remedy]
    if step == _COST and verdict.outcome == "inconclusive":
        step = _MORE
    elif step == _COST and _far_beyond(verdict):
        step = _FAULT
    return step.format(
        pytest=f"quantgate gate {_selection(checkpoint)} --",
        family=check.family.replace("-", "_"),
        file=checkpoint.file or f"fixtures/checkpoints/{checkpoint.id}.toml",
        times=FAR_BEYOND,
    )


def _far_beyond(verdict: Verdict) -> bool:
    """Whether a loss is more than `FAR_BEYOND` times its margin, or NaN."""
    return any(not d.measured <= FAR_BEYOND * d.allowed for d in verdict.deviations)


def _selection(checkpoint: Checkpoint) -> str:
    if checkpoint.scheme is not None:  # it has a file
        return checkpoint.id
    base = f" --base {shlex.quote(checkpoint.base)}" if checkpoint.base else ""
    return f"{shlex.quote(checkpoint.source)}{base}"
