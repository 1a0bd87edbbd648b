"""The three comparisons: fidelity, quality and drift. Measurements in, a verdict out.

Of models that generate and of models that pool: log-probabilities [n] or raw outputs [n, D].
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING, Literal

import numpy as np
from numpy.typing import NDArray

from quantgate.judging.budget import (
    FP32_MAX_RAW,
    REPLAY_MEAN,
    REPLAY_MODULE,
    REPLAY_MODULE_16_BIT,
    ROUNDING_FACTOR,
    fp32_max,
)
from quantgate.judging.evidence import (
    divergence_by_group,
    kernels_line,
    kld_decades,
    profile_of,
    where_they_differ,
)
from quantgate.judging.stats import (
    ALPHA,
    FEWEST_CLUSTERS,
    PairedMean,
    documents_to_decide,
    paired_mean,
    rounding_allowance,
    unpaired_mean,
)
from quantgate.judging.verdict import Deviation, Outcome, Statistic, Verdict, one_sided
from quantgate.measuring.divergence import Divergence, llama_cpp_statistics
from quantgate.subject.task import GENERATE, is_classifier, quantity_of

if TYPE_CHECKING:
    from quantgate.measuring.measurement import Measurement
    from quantgate.measuring.replay import ModuleError, Replay
    from quantgate.subject.probe import Probe

WORST_MODULES = 5


def fidelity_fp32(
    engine: Measurement, reference: Measurement, probe: Probe, *, rounding: Callable[[], float]
) -> Verdict:
    """Judge float32 log-probabilities token by token: both sides computed the same function.

    `rounding`, how far float32 moves the reference (`largest_difference` from float64), is asked
    for only where `FP32_MAX` is exceeded, to tell a fault from a model that amplifies rounding.
    """
    return _token_by_token(engine, reference, "reference", probe, rounding)


def _token_by_token(
    engine: Measurement,
    other: Measurement,
    name: str,
    probe: Probe,
    rounding: Callable[[], float],
) -> Verdict:
    delta = _delta(engine, other)
    limit = fp32_max(probe.task)
    largest = _deviation("max", _max(np.abs(delta)), limit, probe)
    detail = _agreement("engine", engine, name, other, probe)
    if largest.exceeded and not engine.nonfinite:
        moved = rounding()
        allowed = max(limit, moved * ROUNDING_FACTOR)
        largest = dataclasses.replace(largest, allowed=allowed)
        detail += f"; the reference itself moves by {moved:.3g} at most in float64"
    outcome: Outcome = "fail" if largest.exceeded else "pass"
    return _verdict(outcome, detail, [largest], engine, other, probe)


def fidelity_chaotic(
    engine: Measurement, reference: Measurement, exact_reference: Measurement, probe: Probe
) -> Verdict:
    """Judge float32 log-probabilities of a format that quantizes activations, by their mean |Δ|.

    A difference of 1e-7 flips a code, and flips cascade. How far that goes is measured: the
    reference in float64 against itself in float32. Replay is the sharp check of such a format.
    """
    floor = mean_absolute_difference(exact_reference, reference)
    said = (
        f"the reference itself moves by {floor:.3g} in float64, "
        f"{largest_difference(exact_reference, reference):.3g} at most: inputs are quantized"
    )
    allowed = within_rounding(exact_reference, reference, probe)
    return _judge_mean(engine, reference, "reference", allowed, said, probe)


def replayed(engine: Measurement, replay: Replay, probe: Probe) -> Verdict:
    """Judge every linear on the engine's own inputs, and the log-probabilities that come of it.

    In a 16-bit dtype only outputs are judged: inputs carry the rounding of all layers before. What
    the engine was given is given, so no noise of its own moves these numbers.
    """
    dtype = engine.provenance.dtype
    output = max(replay.modules, key=lambda module: _nan_is_largest(module.output))
    entry = max(replay.modules, key=lambda module: _nan_is_largest(module.input))
    delta = np.abs(replay.served.astype(np.float64) - replay.values)
    if dtype == "float32":
        deviations = [
            Deviation("largest module error", output.output, REPLAY_MODULE, "of its rms"),
            Deviation("largest input mismatch", entry.input, REPLAY_MODULE, "of its rms"),
            _deviation("mean", float(np.mean(delta)), REPLAY_MEAN, probe, noisy=False)
            if probe.task == GENERATE
            else _deviation("max", _max(delta), FP32_MAX_RAW, probe, noisy=False),
        ]
    else:
        limit = REPLAY_MODULE_16_BIT[dtype]
        deviations = [Deviation("largest module error", output.output, limit, "of its rms")]
    # The one that is nearest to its limit, or furthest beyond, is what a table shows.
    deviations.sort(key=lambda d: _nan_is_largest(d.measured / d.allowed), reverse=True)
    outcome: Outcome = "fail" if any(d.exceeded for d in deviations) else "pass"
    detail = (
        f"on the engine's own inputs {len(replay.modules)} linears are off by {output.output:.3g} "
        f"of their rms at most ({output.name}), their inputs by {entry.input:.3g} ({entry.name}), "
        f"{quantity_of(probe.task)}s by {np.mean(delta):.3g}{_unit(probe)} on average"
    )
    return Verdict(
        outcome,
        detail,
        tuple(deviations),
        figures=_figures(delta, probe),
        n=len(replay.values),
        dtype=dtype,
        kernels=engine.provenance.kernels,
        emulated=engine.provenance.emulated,
        evidence=() if outcome == "pass" else tuple(modules_beyond(engine, replay)),
    )


def modules_beyond(engine: Measurement, replay: Replay) -> list[str]:
    """Return a line for each of the modules that are furthest beyond replay's limit.

    Where none is, one line says what replay does not see.
    """
    dtype = engine.provenance.dtype
    limit = REPLAY_MODULE if dtype == "float32" else REPLAY_MODULE_16_BIT[dtype]

    def size(module: ModuleError) -> float:
        output = _nan_is_largest(module.output)
        # In 16 bits an input carries the rounding of all layers before.
        return max(output, _nan_is_largest(module.input)) if dtype == "float32" else output

    beyond = sorted((m for m in replay.modules if size(m) > limit), key=size, reverse=True)
    if not beyond:
        return [
            f"module     no linear is off by more than {limit:.3g} of its rms on the engine's own "
            "inputs; replay does not see embeddings, norms, attention and the head: look there"
        ]
    return [_module_line(m, engine, limit) for m in beyond[:WORST_MODULES]]


def _module_line(module: ModuleError, engine: Measurement, limit: float) -> str:
    kind = ".".join(module.module.split(".")[-2:])
    line = (
        f"module     {module.name}: output {module.output:.3g}, input {module.input:.3g} of its "
        f"rms, {engine.provenance.kernels.get(kind, 'kernel unknown')}"
    )
    fed_wrong = module.output <= limit  # but its input is beyond
    return line + "; its product is right, what feeds it is not" if fed_wrong else line


def _nan_is_largest(value: float) -> float:
    return float("inf") if np.isnan(value) else value


def fidelity_serving(
    engine: Measurement,
    reference: Measurement,
    reference_serving: Measurement,
    probe: Probe,
    *,
    base_noise: float | None,
) -> Verdict:
    """Judge the serving dtype by the mean |Δ log-prob| to the float32 reference.

    The allowance is what rounding to that dtype, as this build rounds, may cost the reference
    (`within_rounding`). `base_noise` is the same mean for the unquantized base, shown beside it.
    """
    noise = mean_absolute_difference(reference_serving, reference)
    said = f"the reference itself moves by {noise:.3g} in {engine.provenance.dtype}"
    if base_noise is not None:
        said += f", the unquantized base in vLLM by {base_noise:.3g}"
    allowed = within_rounding(reference_serving, reference, probe)
    return _judge_mean(engine, reference, "float32 reference", allowed, said, probe)


def quality(engine: Measurement, base: Measurement, probe: Probe, *, margin: float) -> Verdict:
    """Judge what quantization costs: mean ΔNLL over the base, non-inferiority with a margin."""
    delta = _delta(base, engine)  # ΔNLL = -Δ log-prob
    if engine.nonfinite or base.nonfinite:
        return _verdict("fail", "a log-probability is not finite", [], engine, base, probe)
    paired = paired_mean(delta, probe.documents)
    cost = _upper_bound("mean ΔNLL", paired, margin, "mean")
    outcome = one_sided(*paired.bounds(), margin)
    detail = (
        f"mean ΔNLL is {paired.mean:.4g} ± {paired.standard_error:.2g} nat/token, perplexity "
        f"{base.perplexity:.4f} → {engine.perplexity:.4f}"
    )
    verdict = _statistical(outcome, detail, [cost], paired, margin, engine, base, probe)
    return dataclasses.replace(
        verdict,
        p_value=paired.p_above(margin),
        unpaired_mde=_unpaired_mde(base, engine, probe),
        figures={**verdict.figures, **_decided(delta, probe, margin)},
    )


def divergence_from_base(
    engine: Measurement, base: Measurement, found: Divergence, probe: Probe, *, margin: float
) -> Verdict:
    """Judge the mean KL divergence of an engine's distributions from the base's, with a margin."""
    if not np.isfinite(found.kld).all():
        return _verdict("fail", "a distribution is not finite", [], engine, base, probe)
    paired = paired_mean(found.kld, probe.documents)
    cost = _upper_bound("mean KLD", paired, margin, "kld")
    outcome = one_sided(*paired.bounds(), margin)
    verdict = _statistical(
        outcome, _divergence_detail(found), [cost], paired, margin, engine, base, probe
    )
    verdict = dataclasses.replace(verdict, p_value=paired.p_above(margin))
    return _with_divergence(verdict, found, probe)


def _upper_bound(what: str, paired: PairedMean, margin: float, statistic: Statistic) -> Deviation:
    what = f"upper {1 - ALPHA:.0%} bound of {what}"
    return Deviation(what, paired.bounds()[1], margin, "nat/token", statistic=statistic)


def _unpaired_mde(a: Measurement, b: Measurement, probe: Probe) -> float:
    """Return what would be detected had the two been measured on different text."""
    unpaired = unpaired_mean(a.logprob, b.logprob, probe.documents)
    return unpaired.minimum_detectable_effect()


def _decided(delta: NDArray[np.float64], probe: Probe, margin: float) -> dict[str, float]:
    """Say after how many documents, shuffled, an early stop would have known."""
    documents = documents_to_decide(delta, probe.documents, margin)
    return {} if documents is None else {"documents until decided": documents}


def divergence_from_reference(
    engine: Measurement,
    reference: Measurement,
    found: Divergence,
    rounded: Divergence,
    probe: Probe,
) -> Verdict:
    """Judge the mean KL divergence of an engine's distributions from the float32 reference's.

    Divergence grows with the square of an error, so the allowance is the square of
    `ROUNDING_FACTOR` times what rounding to the dtype costs the reference itself.
    """
    allowed = rounding_allowance(rounded.kld, probe.documents, ROUNDING_FACTOR**2)
    mean = Deviation("mean KLD", float(found.kld.mean()), allowed, statistic="kld")
    outcome: Outcome = "fail" if mean.exceeded else "pass"
    detail = f"{_divergence_detail(found)}; the reference itself moves by {rounded.kld.mean():.3g}"
    verdict = _verdict(outcome, detail, [mean], engine, reference, probe)
    return _with_divergence(verdict, found, probe)


def _divergence_detail(found: Divergence) -> str:
    return (
        f"mean KLD is {found.kld.mean():.4g} nat, {found.kld.max():.3g} at most; "
        f"{np.count_nonzero(~found.same_top)} of {len(found.kld)} most probable tokens flip"
        f"{_vocabularies(found.extra)}"
    )


def _vocabularies(extra: int) -> str:
    """Say what became of the tokens that only one vocabulary has."""
    if extra > 0:
        return (
            f"; the checkpoint has {extra} tokens that the base lacks: the probability they get "
            "counts as lost"
        )
    if extra < 0:
        return f"; {-extra} tokens that the checkpoint lacks are left out of the base"
    return ""


def _with_divergence(verdict: Verdict, found: Divergence, probe: Probe) -> Verdict:
    """Return a verdict with llama.cpp's statistics, their ±, and where the divergence is."""
    figures = {}
    for name, estimate in llama_cpp_statistics(found).items():
        figures[name] = estimate.value
        if estimate.error is not None:
            figures[f"± {name}"] = estimate.error
    groups = divergence_by_group(found, probe)
    evidence = verdict.evidence
    if verdict.outcome != "pass":
        parts = (f"{name.removeprefix('KLD, ')} {kld:.3g}" for name, kld in groups.items())
        evidence = (*evidence, f"KLD by     {', '.join(parts)}")
    profile = dataclasses.replace(verdict.profile, kld=kld_decades(found))
    return dataclasses.replace(
        verdict, figures=figures | groups, evidence=evidence, profile=profile
    )


def drift_exact(
    engine: Measurement, golden: Measurement, probe: Probe, *, rounding: Callable[[], float]
) -> Verdict:
    """Judge float32 scores against the approved ones, token by token.

    For formats that do not quantize activations; `drift_mean` judges the others. `rounding` is as
    for `fidelity_fp32`: the golden may come from a processor that adds up in another order.
    """
    return _token_by_token(engine, golden, "golden", probe, rounding)


def drift_mean(
    engine: Measurement,
    golden: Measurement,
    probe: Probe,
    *,
    margin: float,
    moved: Callable[[], float],
) -> Verdict:
    """Judge the mean NLL against the approved one: equivalence, both sides.

    For the serving dtype, and for formats that quantize activations, where a difference of 1e-7
    between two machines moves single tokens far. "Better than approved" is drift too. A machine of
    another arithmetic than the golden's is allowed what rounding alone may move the mean between
    the two besides: `moved`, asked for only where the margin is not kept.
    """
    if engine.nonfinite or golden.nonfinite:
        return _verdict("fail", "a log-probability is not finite", [], engine, golden, probe)
    paired = paired_mean(_delta(golden, engine), probe.documents)
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
    verdict = _statistical(outcome, detail, [shift], paired, margin, engine, golden, probe)
    return dataclasses.replace(
        verdict,
        # Outside on either side; at the margin's edge only one of the two can be.
        p_value=min(paired.p_above(margin), paired.p_below(-margin)),
        unpaired_mde=_unpaired_mde(golden, engine, probe),
    )


def drift_rounding(
    engine: Measurement, golden: Measurement, probe: Probe, *, allowed: float
) -> Verdict:
    """Judge pooling outputs against the approved ones by their mean |Δ|.

    For the serving dtype, and for formats that quantize activations. `allowed` is what rounding, or
    its cascade, may cost: two engines that only round are each within it of the exact outputs.
    """
    said = f"rounding may move it by {allowed:.3g}"
    if other := arithmetic_difference(engine, golden):
        said += f" between the two machines ({other})"
    return _judge_mean(engine, golden, "golden", allowed, said, probe)


def arithmetic_difference(engine: Measurement, golden: Measurement) -> str:
    """Return how the arithmetic of two measurements' machines differs; "" where it does not."""
    here, there = engine.provenance.arithmetic, golden.provenance.arithmetic
    names = sorted({*here, *there})
    return ", ".join(
        f"{name} {here.get(name, 'not said')}, not {there.get(name, 'not said')}"
        for name in names
        if here.get(name) != there.get(name)
    )


def mean_shift(rounded: Measurement, exact: Measurement, probe: Probe) -> float:
    """Return the largest |mean| that rounding may move log-probabilities by: its upper bound."""
    return max(map(abs, paired_mean(_delta(rounded, exact), probe.documents).bounds()))


def within_rounding(rounded: Measurement, exact: Measurement, probe: Probe) -> float:
    """Return what mean |Δ| an engine that only rounds may have from the exact reference.

    `ROUNDING_FACTOR` times the reference's own, with the error of a mean of so few values.
    """
    sizes = np.abs(_delta(rounded, exact)).reshape(probe.scored, -1).mean(axis=1)
    return rounding_allowance(sizes, probe.documents, ROUNDING_FACTOR)


def _judge_mean(
    engine: Measurement, other: Measurement, name: str, allowed: float, said: str, probe: Probe
) -> Verdict:
    """Judge the mean |Δ| between two measurements."""
    measured = mean_absolute_difference(engine, other)
    mean = _deviation("mean", measured, allowed, probe)
    detail = f"{_agreement('engine', engine, name, other, probe)}; {said}"
    return _verdict("fail" if mean.exceeded else "pass", detail, [mean], engine, other, probe)


def largest_difference(a: Measurement, b: Measurement) -> float:
    """Return max |Δ| between two measurements; NaN where one is not finite."""
    return _max(np.abs(_delta(a, b)))


def mean_absolute_difference(a: Measurement, b: Measurement) -> float:
    """Return mean |Δ| between two measurements."""
    return float(np.mean(np.abs(_delta(a, b))))


def _delta(a: Measurement, b: Measurement) -> NDArray[np.float64]:
    if a.values.shape != b.values.shape:
        raise ValueError(f"measurements of shapes {a.values.shape} and {b.values.shape}")
    return a.values.astype(np.float64) - b.values.astype(np.float64)


def _max(values: NDArray[np.float64]) -> float:
    return float(values.max())  # NaN wins, and exceeds every allowance


def _deviation(
    kind: Literal["mean", "max"],
    measured: float,
    allowed: float,
    probe: Probe,
    *,
    noisy: bool = True,
) -> Deviation:
    what = f"{kind} |Δ {quantity_of(probe.task)}|"
    unit = "nat" if probe.task == GENERATE else ""
    statistic: Statistic = "mean_abs" if kind == "mean" else "max_abs"
    return Deviation(what, measured, allowed, unit, statistic=statistic if noisy else None)


def _figures(size: NDArray[np.float64], probe: Probe) -> dict[str, float]:
    quantity = quantity_of(probe.task)
    return {f"mean |Δ {quantity}|": float(np.mean(size)), f"max |Δ {quantity}|": _max(size)}


def _unit(probe: Probe) -> str:
    return " nat" if probe.task == GENERATE else ""


def _agreement(one: str, a: Measurement, other: str, b: Measurement, probe: Probe) -> str:
    size = np.abs(_delta(a, b))
    unit = " nat per token" if probe.task == GENERATE else ""
    text = f"{one} and {other} differ by {size.mean():.3g}{unit}, {size.max():.3g} at most"
    if is_classifier(probe.task):
        text += f"; {np.count_nonzero(a.top1 != b.top1)} of {len(a.top1)} labels flip"
    return text


def _statistical(
    outcome: Outcome,
    detail: str,
    deviations: list[Deviation],
    paired: PairedMean,
    margin: float,
    a: Measurement,
    b: Measurement,
    probe: Probe,
) -> Verdict:
    mde = paired.minimum_detectable_effect()
    if paired.clusters < FEWEST_CLUSTERS and outcome == "pass":
        outcome = "inconclusive"
        detail += f"; {paired.clusters} documents are too few, {FEWEST_CLUSTERS} are needed"
    elif outcome == "inconclusive":
        both = any(deviation.two_sided for deviation in deviations)
        detail += f"; {_tokens_wanted(paired, (margin, -margin) if both else (margin,))}"
    return _verdict(outcome, detail, deviations, a, b, probe, mde=mde)


def _tokens_wanted(paired: PairedMean, margins: tuple[float, ...]) -> str:
    """Say how many tokens would put the mean clear of all of `margins`, which these do not."""
    wanted = [paired.tokens_to_decide(margin) for margin in margins]
    numbers = [number for number in wanted if number is not None]
    if len(numbers) < len(wanted):
        return f"{paired.n} tokens cannot decide, and more will not: the mean is at its margin"
    return f"{paired.n} tokens cannot decide, about {max(*numbers, paired.n + 1)} would"


def _verdict(
    outcome: Outcome,
    detail: str,
    deviations: list[Deviation],
    a: Measurement,
    b: Measurement,
    probe: Probe,
    mde: float | None = None,
) -> Verdict:
    nonfinite = Deviation(f"non-finite {quantity_of(probe.task)}s", a.nonfinite, 0, "values")
    if nonfinite.exceeded:
        outcome, deviations = "fail", [nonfinite, *deviations]
    profile = profile_of(a, b, probe)
    shown = outcome != "pass"
    return Verdict(
        outcome=outcome,
        detail=detail,
        deviations=tuple(deviations),
        figures=_figures(np.abs(_delta(a, b)), probe),
        n=len(a.values),
        dtype=a.provenance.dtype,
        mde=mde,
        kernels=a.provenance.kernels,
        emulated=a.provenance.emulated,
        evidence=(*where_they_differ(a, b, probe, profile), *kernels_line(a)) if shown else (),
        profile=profile,
    )
