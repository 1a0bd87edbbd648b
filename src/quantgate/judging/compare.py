"""The comparisons of measurements: fidelity, quality and drift. Measurements in, a verdict out.

For generative and pooling models: log-probabilities [n] or raw outputs [n, D].
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray

from quantgate.judging.budget import ROUNDING_FACTOR, fp32_max
from quantgate.judging.pair import Pair, deviation_of, upper_bound
from quantgate.judging.stats import documents_to_decide, paired_mean, rounding_allowance
from quantgate.judging.verdict import Deviation, Outcome, Verdict, one_sided
from quantgate.measuring.measurement import (
    difference,
    largest_difference,
    mean_absolute_difference,
)

if TYPE_CHECKING:
    from quantgate.measuring.measurement import Measurement
    from quantgate.subject.probe import Probe


def fidelity_fp32(
    engine: Measurement, reference: Measurement, probe: Probe, *, exact: Callable[[], Measurement]
) -> Verdict:
    """Judge float32 log-probabilities token by token: both sides computed the same function.

    `exact`, the reference in float64, is asked only if `FP32_MAX` is exceeded, to tell a fault from
    a model that amplifies rounding. The engine's distance from it is judged then, since the
    distance from a reference in float32 is the sum of both sides' errors where their signs differ.
    """

    def beyond() -> Beyond:
        true = exact()
        off, moved = (largest_difference(one, true) for one in (engine, reference))
        said = f"the engine is off by {off:.3g} at most, the reference by {moved:.3g}"
        return Beyond(off, moved, said)

    return _token_by_token(engine, reference, "reference", probe, beyond)


class Beyond(NamedTuple):
    """How far measurements are from the reference in float64, where `FP32_MAX` is exceeded."""

    off: float
    """What is judged."""
    moved: float
    """The reference in float32."""
    said: str


def _token_by_token(
    engine: Measurement,
    other: Measurement,
    name: str,
    probe: Probe,
    beyond: Callable[[], Beyond],
) -> Verdict:
    pair = Pair(engine, other, probe)
    largest = deviation_of("max", float(pair.size.max()), fp32_max(probe.task), probe)  # NaN wins
    detail = pair.agreement(name)
    if largest.exceeded and not engine.nonfinite:
        off, moved, said = beyond()
        largest = deviation_of("max", off, _amplified(moved, probe), probe)
        detail += f"; from the reference in float64 {said}"
    return pair.verdict("fail" if largest.exceeded else "pass", detail, [largest])


def _amplified(moved: float, probe: Probe) -> float:
    """Return what a model whose float32 reference is off by `moved` may be off by."""
    return max(fp32_max(probe.task), moved * ROUNDING_FACTOR)


def fidelity_chaotic(
    engine: Measurement, reference: Measurement, exact_reference: Measurement, probe: Probe
) -> Verdict:
    """Judge float32 log-probabilities of a format that quantizes activations, by their mean |Δ|.

    A difference of 1e-7 flips a code, and flips cascade. The extent of that is measured: the
    reference in float64 against itself in float32. Replay is the sharp check for such a format.
    """
    floor = mean_absolute_difference(exact_reference, reference)
    said = (
        f"the reference itself moves by {floor:.3g} in float64, "
        f"{largest_difference(exact_reference, reference):.3g} at most: inputs are quantized"
    )
    allowed = within_rounding(exact_reference, reference, probe)
    return _judge_mean(engine, reference, "reference", allowed, said, probe)


def fidelity_serving(
    engine: Measurement,
    reference: Measurement,
    reference_serving: Measurement,
    probe: Probe,
    *,
    base_noise: float | None,
) -> Verdict:
    """Judge the serving dtype by the mean |Δ log-prob| from the float32 reference.

    The allowance is the error that rounding to that dtype, as this build rounds, may cause in the
    reference (`within_rounding`). `base_noise` is the same mean for the unquantized base, shown
    alongside.
    """
    noise = mean_absolute_difference(reference_serving, reference)
    said = f"the reference itself moves by {noise:.3g} in {engine.provenance.dtype}"
    if base_noise is not None:
        said += f", the unquantized base in vLLM by {base_noise:.3g}"
    allowed = within_rounding(reference_serving, reference, probe)
    return _judge_mean(engine, reference, "float32 reference", allowed, said, probe)


def quality(engine: Measurement, base: Measurement, probe: Probe, *, margin: float) -> Verdict:
    """Judge the cost of quantization: mean ΔNLL against the base, non-inferiority with a margin."""
    pair = Pair(engine, base, probe)
    delta = -pair.delta  # ΔNLL = -Δ log-prob
    if engine.nonfinite or base.nonfinite:
        return pair.verdict("fail", "a log-probability is not finite", [])
    paired = paired_mean(delta, probe.documents)
    cost = upper_bound("mean ΔNLL", paired, margin, "mean")
    outcome = one_sided(*paired.bounds(), margin)
    detail = (
        f"mean ΔNLL is {paired.mean:.4g} ± {paired.standard_error:.2g} nat/token, perplexity "
        f"{base.perplexity:.4f} → {engine.perplexity:.4f}"
    )
    verdict = pair.statistical_verdict(outcome, detail, cost, paired, margin)
    return dataclasses.replace(
        verdict,
        p_value=paired.p_above(margin),
        unpaired_mde=pair.unpaired_mde(),
        figures={
            **verdict.figures,
            "perplexity": engine.perplexity,
            "perplexity of the base": base.perplexity,
            "mean ΔNLL": paired.mean,
            "± mean ΔNLL": paired.standard_error,
            **_decided(delta, probe, margin),
        },
    )


def _decided(delta: NDArray[np.float64], probe: Probe, margin: float) -> dict[str, float]:
    """Return after how many documents, shuffled, an early stop would have decided."""
    documents = documents_to_decide(delta, probe.documents, margin)
    return {} if documents is None else {"documents until decided": documents}


def drift_exact(
    engine: Measurement,
    golden: Measurement,
    probe: Probe,
    *,
    exact: Callable[[], Measurement],
    reference: Callable[[], Measurement],
) -> Verdict:
    """Judge float32 scores against the approved ones, token by token.

    For formats that do not quantize activations; `drift_mean` judges the others. Beyond `FP32_MAX`
    the golden may come from a processor that sums in a different order: engine and golden must
    then each be as near to the `exact` reference, in float64, as `fidelity_fp32` asks, where
    `reference` is the same in float32.
    """

    def beyond() -> Beyond:
        true = exact()
        off, was, moved = (largest_difference(one, true) for one in (engine, golden, reference()))
        said = (
            f"the engine is off by {off:.3g} at most, the golden by {was:.3g}, the reference in "
            f"float32 by {moved:.3g}"
        )
        return Beyond(max(off, was), moved, said)

    return _token_by_token(engine, golden, "golden", probe, beyond)


def drift_mean(
    engine: Measurement,
    golden: Measurement,
    probe: Probe,
    *,
    margin: float,
    moved: Callable[[], float],
) -> Verdict:
    """Judge the mean NLL against the approved one by a two-sided equivalence test.

    For the serving dtype, and for formats that quantize activations, where a difference of 1e-7
    between two machines moves single tokens far. "Better than approved" is drift too. If the
    machine's arithmetic differs from the golden's, the limit also includes `moved`, the shift of
    the mean that rounding alone may cause between the two; it is computed only if the margin is
    exceeded.
    """
    pair = Pair(engine, golden, probe)
    if engine.nonfinite or golden.nonfinite:
        return pair.verdict("fail", "a log-probability is not finite", [])
    paired = paired_mean(-pair.delta, probe.documents)
    lower, upper = paired.bounds()
    furthest = max(lower, upper, key=abs)
    other = arithmetic_difference(engine, golden)
    if abs(furthest) >= margin and other:
        margin += (rounding := moved())
        other = f"; rounding may move it by {rounding:.3g} between the two machines ({other})"
    else:
        other = ""
    shift = Deviation(
        "bound of mean ΔNLL", furthest, margin, "nat/token", two_sided=True, statistic="mean"
    )
    inside, outside = -margin < lower and upper < margin, lower > margin or upper < -margin
    outcome: Outcome = "pass" if inside else "fail" if outside else "inconclusive"
    detail = (
        f"mean ΔNLL is {paired.mean:.4g} ± {paired.standard_error:.2g} nat/token, perplexity "
        f"{golden.perplexity:.4f} → {engine.perplexity:.4f}{other}"
    )
    verdict = pair.statistical_verdict(outcome, detail, shift, paired, margin)
    return dataclasses.replace(
        verdict,
        # Beyond the margin on either side; a true mean at one edge cannot be beyond the other.
        p_value=min(paired.p_above(margin), paired.p_below(-margin)),
        unpaired_mde=pair.unpaired_mde(),
    )


def drift_rounding(
    engine: Measurement, golden: Measurement, probe: Probe, *, allowed: float
) -> Verdict:
    """Judge pooling outputs against the approved ones by their mean |Δ|.

    For the serving dtype, and for formats that quantize activations. `allowed` is the error that
    rounding, or its cascade, may cause: an engine that only rounds is within it of the exact
    outputs.
    """
    said = f"rounding may move it by {allowed:.3g}"
    if other := arithmetic_difference(engine, golden):
        said += f" between the two machines ({other})"
    return _judge_mean(engine, golden, "golden", allowed, said, probe)


def arithmetic_difference(engine: Measurement, golden: Measurement) -> str:
    """Return how the arithmetic of two measurements' machines differs; "" if it does not."""
    here, there = engine.provenance.arithmetic, golden.provenance.arithmetic
    names = sorted({*here, *there})
    return ", ".join(
        f"{name} {here.get(name, 'not said')}, not {there.get(name, 'not said')}"
        for name in names
        if here.get(name) != there.get(name)
    )


def mean_shift(rounded: Measurement, exact: Measurement, probe: Probe) -> float:
    """Return an upper bound of |mean Δ log-probability| that rounding may cause."""
    return max(map(abs, paired_mean(difference(rounded, exact), probe.documents).bounds()))


def within_rounding(rounded: Measurement, exact: Measurement, probe: Probe) -> float:
    """Return the mean |Δ| from the exact reference allowed for an engine that only rounds.

    `ROUNDING_FACTOR` times the reference's own, plus the sampling error of that mean.
    """
    sizes = np.abs(difference(rounded, exact)).reshape(probe.scored, -1).mean(axis=1)
    return rounding_allowance(sizes, probe.documents, ROUNDING_FACTOR)


def _judge_mean(
    engine: Measurement, other: Measurement, name: str, allowed: float, said: str, probe: Probe
) -> Verdict:
    """Judge the mean |Δ| between two measurements."""
    pair = Pair(engine, other, probe)
    mean = deviation_of("mean", float(np.mean(pair.size)), allowed, probe)
    detail = f"{pair.agreement(name)}; {said}"
    return pair.verdict("fail" if mean.exceeded else "pass", detail, [mean])
