"""Replay's verdict: every linear on the engine's own inputs, and which of them are wrong."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from quantgate.formats.kernels import truncates_sums
from quantgate.judging.budget import (
    FP32_MAX_RAW,
    OTHER_EXPERTS,
    REPLAY_MEAN,
    REPLAY_MODULE,
    REPLAY_MODULE_16_BIT,
    ROUNDING_FACTOR,
    fp8_sum_error,
)
from quantgate.judging.pair import deviation_of, figures_of
from quantgate.judging.verdict import Deviation, Outcome, Verdict, verdict_on
from quantgate.measuring.precision import FLOAT32
from quantgate.subject.task import GENERATE, quantity_of

if TYPE_CHECKING:
    from quantgate.measuring.measurement import Measurement
    from quantgate.measuring.replay import Choice, ModuleError, Replay
    from quantgate.subject.probe import Probe

WORST_MODULES = 5


def replayed(
    engine: Measurement,
    replay: Replay,
    probe: Probe,
    *,
    rounding: Callable[[], NDArray[np.float64]],
) -> Verdict:
    """Judge every linear on the engine's own inputs, and the resulting log-probabilities.

    In a 16-bit dtype only outputs are judged: inputs carry the rounding of all earlier layers. The
    inputs are fixed, so the engine's noise does not affect these numbers. `rounding`, how far
    float32 moves the reference's values from float64's, is computed only if the limit of the values
    is exceeded, to tell a fault from a model that amplifies rounding.
    """
    dtype = engine.provenance.dtype
    # Of its limit, which may depend on the module.
    output = max(replay.modules, key=lambda m: _nan_is_largest(m.output / _limit_of(m, engine)))
    entry = max(replay.modules, key=lambda module: _nan_is_largest(module.input))
    delta = np.abs(replay.served.astype(np.float64) - replay.values)
    if dtype == FLOAT32:
        deviations = [
            Deviation("largest module error", output.output, REPLAY_MODULE, "of its rms"),
            Deviation("largest input mismatch", entry.input, REPLAY_MODULE, "of its rms"),
            _values_deviation(delta, probe, rounding),
            *_choice_deviations(replay.choices),
        ]
    else:
        limit = _limit_of(output, engine)
        deviations = [Deviation("largest module error", output.output, limit, "of its rms")]
    # A table shows the one nearest to its limit, or furthest beyond.
    deviations.sort(key=lambda d: _nan_is_largest(d.measured / d.allowed), reverse=True)
    outcome: Outcome = "fail" if any(d.exceeded for d in deviations) else "pass"
    detail = (
        f"on the engine's own inputs {len(replay.modules)} linears are off by {output.output:.3g} "
        f"of their rms at most ({output.name}), their inputs by {entry.input:.3g} ({entry.name}), "
        f"{quantity_of(probe.task)}s by {np.mean(delta):.3g}"
        f"{' nat' if probe.task == GENERATE else ''} on average"
        f"{_chosen(replay.choices)}"
    )
    return verdict_on(
        engine,
        outcome,
        detail,
        deviations,
        figures=figures_of(delta, probe),
        n=len(replay.values),
        evidence=() if outcome == "pass" else tuple(modules_beyond(engine, replay)),
    )


def _values_deviation(
    delta: NDArray[np.float64], probe: Probe, rounding: Callable[[], NDArray[np.float64]]
) -> Deviation:
    """Return the deviation of replayed values: the mean of log-probabilities, or the largest."""
    kind: Literal["mean", "max"] = "mean" if probe.task == GENERATE else "max"
    of: Callable[..., Any] = np.mean if kind == "mean" else np.max
    limit = REPLAY_MEAN if kind == "mean" else FP32_MAX_RAW
    found = float(of(delta))
    if found > limit:
        limit = max(limit, ROUNDING_FACTOR * float(of(rounding())))
    return deviation_of(kind, found, limit, probe, noisy=False)


def _choice_deviations(choices: Sequence[Choice]) -> list[Deviation]:
    """Return the deviations of the experts that the engine chose; none of a dense model."""
    if not choices:
        return []
    weights = max(choices, key=lambda choice: _nan_is_largest(choice.weights))
    most = max(choices, key=lambda choice: choice.share)
    return [
        Deviation(
            "largest error of experts' weights", weights.weights, REPLAY_MODULE, "of its rms"
        ),
        Deviation("tokens with other experts", most.share, OTHER_EXPERTS, "of a layer's"),
    ]


def _chosen(choices: Sequence[Choice]) -> str:
    """Return how many tokens have other experts than the reference's, for a verdict's sentence."""
    if not choices:
        return ""
    tokens = sum(choice.tokens for choice in choices)
    return (
        f"; {sum(choice.differ for choice in choices)} of {tokens} choices of experts differ from "
        "the reference's"
    )


def _choice_lines(choices: Sequence[Choice]) -> list[str]:
    """Return a line for each layer whose choice of experts is beyond its limits."""
    return [
        f"routing    {choice.name}: {choice.differ} of {choice.tokens} tokens have other experts, "
        f"weights off by {choice.weights:.3g} of their rms"
        for choice in choices
        if not (choice.weights <= REPLAY_MODULE and choice.share <= OTHER_EXPERTS)
    ]


def modules_beyond(engine: Measurement, replay: Replay) -> list[str]:
    """Return a line for each of the modules furthest beyond replay's limit.

    If there are none, one line says what replay does not cover.
    """
    exact = engine.provenance.dtype == FLOAT32

    def size(module: ModuleError) -> float:
        output = _nan_is_largest(module.output)
        # In 16 bits an input carries the rounding of all earlier layers.
        return max(output, _nan_is_largest(module.input)) if exact else output

    limits = {module.name: _limit_of(module, engine) for module in replay.modules}
    beyond = [module for module in replay.modules if size(module) > limits[module.name]]
    choices = _choice_lines(replay.choices) if exact else []
    if not beyond and choices:
        return choices[:WORST_MODULES]
    if not beyond:
        return [
            f"module     no linear is off by more than {max(limits.values()):.3g} of its rms on "
            "the engine's own inputs; replay does not see embeddings, norms, attention and the "
            "head: look there"
        ]
    beyond.sort(key=size, reverse=True)
    lines = [_module_line(m, engine, limits[m.name]) for m in beyond]
    return [*lines, *choices][:WORST_MODULES]


def _limit_of(module: ModuleError, engine: Measurement) -> float:
    """Return what a module may be off by, of its rms."""
    provenance = engine.provenance
    if provenance.dtype == FLOAT32:
        return REPLAY_MODULE
    limit = REPLAY_MODULE_16_BIT[provenance.dtype]
    if truncates_sums(_kernel_of(module, engine), provenance.platform):
        limit = float(np.hypot(limit, fp8_sum_error(module.depth)))
    return limit


def _kernel_of(module: ModuleError, engine: Measurement) -> str:
    kind = ".".join(module.module.split(".")[-2:])
    return str(engine.provenance.kernels.get(kind, "kernel unknown"))


def _module_line(module: ModuleError, engine: Measurement, limit: float) -> str:
    line = (
        f"module     {module.name}: output {module.output:.3g}, input {module.input:.3g} of its "
        f"rms, {_kernel_of(module, engine)}"
    )
    fed_wrong = module.output <= limit  # but its input is beyond the limit
    return line + "; its product is right, what feeds it is not" if fed_wrong else line


def _nan_is_largest(value: float) -> float:
    return float("inf") if np.isnan(value) else value
