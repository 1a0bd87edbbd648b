"""Comparisons on made-up measurements: the outcomes and the text of a failure."""

import dataclasses
import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from quantgate.judging import compare, distributions
from quantgate.judging.stats import paired_mean
from quantgate.judging.verdict import Deviation, Verdict, worst
from quantgate.measuring.divergence import Divergence
from quantgate.measuring.measurement import Measurement, Provenance
from quantgate.subject.probe import Probe, Window

PROBE = Probe("p", 99, tuple(Window(f"d{i}", "prose", 1, tuple(range(26)), "") for i in range(40)))
RNG = np.random.default_rng(0)
SCORES = RNG.normal(-2, 1, PROBE.scored).astype(np.float32)


def measured(logprob: np.ndarray, source: str = "engine", **provenance: object) -> Measurement:
    found = Provenance(source, "cpu", "cpu", "float32")
    found = dataclasses.replace(found, **provenance)  # type: ignore[arg-type]
    return Measurement(np.asarray(logprob, np.float32), np.zeros(len(logprob), np.int32), found)


def diverged(kld: np.ndarray) -> Divergence:
    n = len(kld)
    return Divergence(
        kld, SCORES.astype(float), SCORES.astype(float), kld < 0.5, np.linspace(0, 1, n)
    )


def test_divergence_from_the_base_is_shown_to_be_within_its_margin() -> None:
    rng = np.random.default_rng(5)
    kld = rng.exponential(0.01, PROBE.scored)
    engine, base = measured(SCORES), measured(SCORES)

    def judge(kld: np.ndarray, margin: float) -> Verdict:
        return distributions.divergence_from_base(engine, base, diverged(kld), PROBE, margin=margin)

    passed = judge(kld, 0.012)
    assert passed.outcome == "pass"
    assert passed.figures["Mean KLD"] == pytest.approx(kld.mean())
    assert passed.evidence == ()
    assert judge(kld, float(kld.mean())).outcome == "inconclusive"
    failed = judge(kld, 0.008)
    assert failed.outcome == "fail"
    assert any("position < 64 " in line for line in failed.evidence if "KLD by" in line)
    assert any("base's p < 0.5 " in line for line in failed.evidence if "KLD by" in line)
    assert failed.figures["± Mean KLD"] > 0
    kld[3] = np.nan
    assert judge(kld, 1.0).outcome == "fail"


def test_divergence_from_the_reference_may_be_the_square_of_twice_its_rounding() -> None:
    engine, reference = measured(SCORES), measured(SCORES, "reference")
    moved = diverged(np.full(PROBE.scored, 1e-4))
    for size, outcome in ((3.9e-4, "pass"), (4.1e-4, "fail"), (np.nan, "fail")):
        found = diverged(np.full(PROBE.scored, size))
        verdict = distributions.divergence_from_reference(engine, reference, found, moved, PROBE)
        assert verdict.outcome == outcome


def test_fp32_fidelity_is_a_limit_on_the_worst_token() -> None:
    off = SCORES.copy()
    off[77] += 1e-3
    same = measured(SCORES, "reference")

    def judge(engine: Measurement) -> Verdict:
        return compare.fidelity_fp32(engine, same, PROBE, exact=lambda: same)

    assert judge(measured(SCORES)).outcome == "pass"
    failed = judge(measured(off))
    assert failed.outcome == "fail"
    assert failed.evidence[0].startswith("worst      d3[3] token 3: ")


def test_a_format_that_quantizes_inputs_is_allowed_its_references_own_chaos() -> None:
    rng = np.random.default_rng(4)
    reference, exact, usual, faulty = (
        measured(SCORES + rng.normal(0, size, PROBE.scored)) for size in (0, 1e-3, 1e-3, 4e-3)
    )
    assert compare.fidelity_chaotic(usual, reference, exact, PROBE).outcome == "pass"
    failed = compare.fidelity_chaotic(faulty, reference, exact, PROBE)
    assert failed.outcome == "fail"
    moved = np.mean(np.abs(exact.logprob.astype(float) - reference.logprob))
    # Twice, and the error of a mean of a thousand values in 40 documents.
    assert 2 * moved < failed.deviations[0].allowed < 2.4 * moved


def in_float32(engine_off: float, reference_off: float) -> Verdict:
    """Judge an engine and a reference that are off by so much, from exact scores, at one token."""
    engine, reference = SCORES.astype(np.float64), SCORES.astype(np.float64)
    engine[5] += engine_off
    reference[5] += reference_off
    return compare.fidelity_fp32(
        measured(engine),
        measured(reference, "reference"),
        PROBE,
        exact=lambda: measured(SCORES, "reference"),
    )


def test_a_model_that_amplifies_rounding_is_allowed_twice_its_references_own() -> None:
    verdict = in_float32(3e-5, -2e-5)
    assert verdict.outcome == "pass"
    assert verdict.deviations[0].measured == pytest.approx(3e-5, rel=0.05)
    assert verdict.deviations[0].allowed == pytest.approx(4e-5, rel=0.05)
    assert verdict.detail.endswith("the engine is off by 3e-05 at most, the reference by 2e-05")
    assert in_float32(5e-5, 2e-5).outcome == "fail"


@pytest.mark.parametrize(
    ("engine", "reference", "outcome"),
    [(6e-6, -5.5e-6, "pass"), (1.3e-5, 0.0, "fail"), (2.5e-5, 5.5e-6, "fail")],
)
def test_errors_of_opposite_signs_are_not_added_up(
    engine: float, reference: float, outcome: str
) -> None:
    """5.85e-6 and -5.48e-6, at one of 3,872 tokens, on an Intel processor as AVX2."""
    assert in_float32(engine, reference).outcome == outcome


@pytest.mark.parametrize(
    ("engine", "golden", "outcome"),
    [
        (6e-6, -5.5e-6, "pass"),  # two machines that round, apart by more than 1e-5
        (0.0, 9e-6, "pass"),
        (1.3e-5, 0.0, "fail"),  # what is served now is off
        (0.0, 1.3e-5, "fail"),  # what was approved was
    ],
)
def test_a_golden_of_another_order_of_sums_may_differ_as_rounding_does(
    engine: float, golden: float, outcome: str
) -> None:
    ours, theirs, rounded = (SCORES.astype(np.float64) for _ in range(3))
    ours[5] += engine
    theirs[5] += golden
    rounded[9] += 5.5e-6
    verdict = compare.drift_exact(
        measured(ours),
        measured(theirs, "golden"),
        PROBE,
        exact=lambda: measured(SCORES, "reference"),
        reference=lambda: measured(rounded, "reference"),
    )
    assert verdict.outcome == outcome


@pytest.mark.parametrize(
    ("cost", "outcome"), [(0.0, "pass"), (0.2, "fail"), (0.099, "inconclusive")]
)
def test_quality_is_decided_by_the_confidence_bound(cost: float, outcome: str) -> None:
    noise = np.repeat(np.random.default_rng(1).normal(0, 0.03, 40), 25)
    quantized = measured(SCORES - cost + (noise - noise.mean()))
    verdict = compare.quality(quantized, measured(SCORES), PROBE, margin=0.1)
    assert verdict.outcome == outcome
    assert verdict.n == PROBE.scored
    if outcome == "inconclusive":
        assert "1000 tokens cannot decide, about" in verdict.detail


def said_to_be_wanted(verdict: Verdict) -> int:
    found = re.search(r"(\d+) tokens cannot decide, about (\d+) would", verdict.detail)
    assert found is not None, verdict.detail
    assert int(found[1]) == PROBE.scored
    return int(found[2])


@given(cost=st.floats(-0.3, 0.3), margin=st.sampled_from([0.02, 0.1]), seed=st.integers(0, 9))
@hypothesis_settings(deadline=None)
def test_what_would_decide_is_more_than_what_cannot(cost: float, margin: float, seed: int) -> None:
    """One-sided: nearness to -margin is of no matter. Equivalence: the nearer margin is what is."""
    spread = np.repeat(np.random.default_rng(seed).normal(0, 0.3, 40), 25)
    base, engine = measured(SCORES), measured(SCORES - cost + spread)
    paired = paired_mean(
        base.values.astype(np.float64) - engine.values.astype(np.float64), PROBE.documents
    )
    to = {sign: paired.tokens_to_decide(sign * margin) or np.inf for sign in (1, -1)}
    quality = compare.quality(engine, base, PROBE, margin=margin)
    if quality.outcome == "inconclusive":
        assert said_to_be_wanted(quality) == max(to[1], PROBE.scored + 1)
    drift = compare.drift_mean(engine, base, PROBE, margin=margin, moved=lambda: 0.0)
    if drift.outcome == "inconclusive":
        assert said_to_be_wanted(drift) == max(to[1], to[-1], PROBE.scored + 1)


def test_better_than_approved_is_drift_too() -> None:
    noise = np.random.default_rng(2).normal(0, 1e-3, PROBE.scored)
    for shift in (0.01, -0.01):
        verdict = compare.drift_mean(
            measured(SCORES + noise + shift),
            measured(SCORES, "golden"),
            PROBE,
            margin=1e-3,
            moved=lambda: 0.0,
        )
        assert verdict.outcome == "fail"
    same = compare.drift_mean(
        measured(SCORES + noise), measured(SCORES, "golden"), PROBE, margin=1e-3, moved=lambda: 0.0
    )
    assert same.outcome == "pass"


def test_another_arithmetic_than_the_goldens_is_allowed_what_rounding_does() -> None:
    shifted = SCORES + np.random.default_rng(2).normal(0.0015, 1e-4, PROBE.scored)
    here, there = {"isa": "AVX2", "threads": "2"}, {"isa": "AVX512", "threads": "2"}
    asked = []

    def drift(golden: dict[str, str], moved: float) -> Verdict:
        def rounding() -> float:
            asked.append(moved)
            return moved

        return compare.drift_mean(
            measured(shifted, arithmetic=here),
            measured(SCORES, "golden", arithmetic=golden),
            PROBE,
            margin=1e-3,
            moved=rounding,
        )

    assert drift(here, 0.001).outcome == "fail"
    assert asked == []  # on the golden's own arithmetic there is nothing to allow
    allowed = drift(there, 0.001)
    assert allowed.outcome == "pass"
    assert allowed.deviations[0].allowed == pytest.approx(0.002)
    assert "isa AVX2, not AVX512" in allowed.detail
    assert "threads" not in allowed.detail
    assert drift(there, 0.0001).outcome == "fail"


def test_within_rounding_does_not_grow_with_a_fault_of_the_engine() -> None:
    """One document that is far off is found: the allowance is of the reference alone."""
    rounded = measured(SCORES + np.random.default_rng(4).normal(0, 1e-3, PROBE.scored))
    engine = SCORES.copy()
    engine[PROBE.documents == "d3"] += 0.5
    verdict = compare.fidelity_serving(
        measured(engine, dtype="bfloat16"), measured(SCORES), rounded, PROBE, base_noise=None
    )
    assert verdict.outcome == "fail"


def test_a_cost_of_exactly_its_margin_is_inconclusive() -> None:
    """With noise, and where every token costs the same, so that there is none."""
    margin = 0.0625
    cost = np.random.default_rng(3).normal(0, 0.1, PROBE.scored)
    for spread in (cost - cost.mean(), np.zeros(PROBE.scored)):
        base = dataclasses.replace(measured(SCORES), values=SCORES.astype(np.float64))
        engine = dataclasses.replace(base, values=base.values - spread - margin)
        at_it = compare.quality(engine, base, PROBE, margin=margin)
        assert at_it.outcome == "inconclusive"
        assert "cannot decide, and more will not: the mean is at its margin" in at_it.detail
        drifted = compare.drift_mean(engine, base, PROBE, margin=margin, moved=lambda: 0.0)
        assert drifted.outcome == "inconclusive"
        assert compare.quality(engine, base, PROBE, margin=margin * 1.5).outcome == "pass"
        assert compare.quality(engine, base, PROBE, margin=margin / 1.5).outcome == "fail"


def test_quality_says_what_another_text_would_have_detected_and_when_it_was_decided() -> None:
    noise = np.random.default_rng(3).normal(0, 0.02, PROBE.scored)
    verdict = compare.quality(measured(SCORES + noise), measured(SCORES), PROBE, margin=0.05)
    assert verdict.outcome == "pass"
    assert verdict.mde is not None
    assert verdict.unpaired_mde is not None
    assert verdict.unpaired_mde > 20 * verdict.mde
    assert 30 <= verdict.figures["documents until decided"] <= 40
    assert verdict.p_value is not None
    assert verdict.p_value > 0.5


def test_too_few_documents_cannot_pass() -> None:
    few = Probe("p", 99, PROBE.windows[:5])
    scores = SCORES[: few.scored]
    verdict = compare.quality(measured(scores), measured(scores), few, margin=0.1)
    assert verdict.outcome == "inconclusive"
    assert "5 documents are too few, 30 are needed" in verdict.detail


def test_a_failure_reads_cause_evidence_next_step() -> None:
    verdict = Verdict(
        "fail",
        "engine and golden differ",
        (
            Deviation("max |Δ log-prob|", 0.25, 1e-5),
            Deviation("bound", -0.5, 0.1, "nat/token", two_sided=True, floor=0.02),
        ),
        n=17945,
        mde=0.0012,
        unpaired_mde=0.17,
        p_value=0.003,
        emulated=("K",),
        repaired=("score.0",),
        evidence=("worst      d[1]",),
        since_golden="vllm 0.31 → 0.32 (golden of 2026-11-01)",
        next_step="look",
    )
    assert verdict.message("x drift") == (
        "x drift: FAIL: engine and golden differ\n"
        "  max |Δ log-prob| is 0.25 nat, allowed <= 1e-05\n"
        "  bound is -0.5 nat/token, allowed within ±0.1, noise floor 0.02\n"
        "  n          17,945, MDE 0.0012 (unpaired 0.17), p of a fail 0.003\n"
        "  worst      d[1]\n"
        "  emulated   K: no evidence about a real kernel\n"
        "  repaired   score.0: quantgate keeps this head whole; stock vLLM would load it as "
        "quantized layers\n"
        "  since then vllm 0.31 → 0.32 (golden of 2026-11-01)\n"
        "  next       look"
    )


def test_a_number_that_is_none_exceeds_every_allowance() -> None:
    assert Deviation("x", float("nan"), 1e9).exceeded
    assert Deviation("x", -2.0, 1.0, two_sided=True).exceeded
    assert not Deviation("x", 1.0, 1.0).exceeded


def test_the_worst_outcome_decides_and_none_is_no_pass() -> None:
    assert worst(["pass", "inconclusive", "pass"]) == "inconclusive"
    assert worst(["not-run", "inconclusive"]) == "not-run"
    assert worst(["fail", "not-run"]) == "fail"
    assert worst([]) == "not-run"
