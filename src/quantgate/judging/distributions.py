"""Verdicts on whole next-token distributions: KL divergence from the base, and the reference."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import numpy as np

from quantgate.judging.budget import ROUNDING_FACTOR
from quantgate.judging.evidence import divergence_by_group, kld_decades
from quantgate.judging.llama_cpp import llama_cpp_statistics
from quantgate.judging.pair import Pair, upper_bound
from quantgate.judging.stats import paired_mean, rounding_allowance
from quantgate.judging.verdict import Deviation, Outcome, Verdict, one_sided

if TYPE_CHECKING:
    from quantgate.measuring.divergence import Divergence
    from quantgate.measuring.measurement import Measurement
    from quantgate.subject.probe import Probe


def divergence_from_base(
    engine: Measurement, base: Measurement, found: Divergence, probe: Probe, *, margin: float
) -> Verdict:
    """Judge the mean KL divergence of an engine's distributions from the base's, with a margin."""
    pair = Pair(engine, base, probe)
    if not np.isfinite(found.kld).all():
        return pair.verdict("fail", "a distribution is not finite", [])
    paired = paired_mean(found.kld, probe.documents)
    cost = upper_bound("mean KLD", paired, margin, "kld")
    outcome = one_sided(*paired.bounds(), margin)
    verdict = pair.statistical_verdict(outcome, _divergence_detail(found), cost, paired, margin)
    verdict = dataclasses.replace(verdict, p_value=paired.p_above(margin))
    return _with_divergence(verdict, found, probe)


def divergence_from_reference(
    engine: Measurement,
    reference: Measurement,
    found: Divergence,
    rounded: Divergence,
    probe: Probe,
) -> Verdict:
    """Judge the mean KL divergence of an engine's distributions from the float32 reference's.

    Divergence grows with the square of an error, so the allowance is the square of
    `ROUNDING_FACTOR` times the divergence that rounding to the dtype causes in the reference.
    """
    allowed = rounding_allowance(rounded.kld, probe.documents, ROUNDING_FACTOR**2)
    mean = Deviation("mean KLD", float(found.kld.mean()), allowed, statistic="kld")
    outcome: Outcome = "fail" if mean.exceeded else "pass"
    detail = f"{_divergence_detail(found)}; the reference itself moves by {rounded.kld.mean():.3g}"
    verdict = Pair(engine, reference, probe).verdict(outcome, detail, [mean])
    return _with_divergence(verdict, found, probe)


def _divergence_detail(found: Divergence) -> str:
    return (
        f"mean KLD is {found.kld.mean():.4g} nat, {found.kld.max():.3g} at most; "
        f"{np.count_nonzero(~found.same_top)} of {len(found.kld)} most probable tokens flip"
        f"{_vocabularies(found.extra)}"
    )


def _vocabularies(extra: int) -> str:
    """Describe how the tokens that only one vocabulary has were treated."""
    if extra > 0:
        return (
            f"; the checkpoint has {extra} tokens that the base lacks: the probability they get "
            "counts as lost"
        )
    if extra < 0:
        return f"; {-extra} tokens that the checkpoint lacks are left out of the base"
    return ""


def _with_divergence(verdict: Verdict, found: Divergence, probe: Probe) -> Verdict:
    """Return a verdict with llama.cpp's statistics, their ±, and the divergence by group."""
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
