import re
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy import stats

from quantgate.judging.stats import (
    ALPHA,
    FEWEST_CLUSTERS,
    PairedMean,
    confidence_sequence,
    documents_to_decide,
    holm,
    paired_mean,
    rounding_allowance,
    stationary_variance,
    unpaired_mean,
)


@given(seed=st.integers(0, 999), clusters=st.integers(2, 60))
@settings(deadline=None, max_examples=50)
def test_rounding_is_allowed_its_factor_and_the_error_of_its_mean(seed: int, clusters: int) -> None:
    documents = np.repeat(np.arange(clusters), 3)
    sizes = np.abs(np.random.default_rng(seed).normal(size=len(documents)))
    allowed = rounding_allowance(sizes, documents, 2.0)
    assert allowed >= 2 * sizes.mean()
    assert rounding_allowance(4 * sizes, documents, 2.0) == pytest.approx(4 * allowed)
    # What is known exactly has no error.
    assert rounding_allowance(np.ones(len(sizes)), documents, 2.0) == pytest.approx(2.0)


@pytest.mark.long
def test_one_draw_in_a_thousand_exceeds_what_another_allows() -> None:
    """Of 80 values each: the mean of one sample against the allowance of another, factor 1."""
    rng = np.random.default_rng(0)
    documents = np.arange(80)
    draws = np.abs(rng.normal(size=(4000, 2, 80)))
    beyond = [one.mean() > rounding_allowance(other, documents, 1.0) for one, other in draws]
    # 4 of 4,000 are expected of a normal mean; half-normal values are skewed, which doubles it.
    assert sum(beyond) <= 16
    assert 0.1 < np.mean([one.mean() > other.mean() for one, other in draws]) < 0.9


def test_standard_error_of_singleton_clusters_is_the_ordinary_one() -> None:
    d = np.random.default_rng(0).normal(size=200)
    found = paired_mean(d, np.arange(200))
    assert found.clustered_error == pytest.approx(d.std(ddof=1) / np.sqrt(200), rel=1e-12)
    # Blocks of one: the same, but for the correction of n - 1.
    assert found.block_error == pytest.approx(d.std() / np.sqrt(200), rel=1e-12)
    low, high = found.bounds(alpha=0.05)
    expected = stats.t.interval(0.90, 199, loc=d.mean(), scale=found.standard_error)
    assert (low, high) == pytest.approx(expected, rel=1e-12)


def test_copies_within_a_cluster_do_not_count_as_evidence() -> None:
    d = np.random.default_rng(1).normal(size=50)
    once = paired_mean(d, np.arange(50))
    tenfold = paired_mean(np.repeat(d, 10), np.repeat(np.arange(50), 10))
    assert tenfold.standard_error == pytest.approx(once.standard_error, rel=1e-12)
    assert tenfold.n == 500


@given(
    arrays(np.float64, st.integers(4, 60), elements=st.floats(-5, 5)),
    st.floats(-3, 3),
    st.integers(2, 4),
)
@settings(deadline=None)
def test_shifting_moves_the_mean_and_nothing_else(
    d: np.ndarray, shift: float, clusters: int
) -> None:
    labels = np.arange(len(d)) % clusters
    a, b = paired_mean(d, labels), paired_mean(d + shift, labels)
    assert b.mean == pytest.approx(a.mean + shift, abs=1e-9)
    assert b.standard_error == pytest.approx(a.standard_error, abs=1e-9)


@pytest.mark.long
def test_false_alarms_on_clustered_data_stay_at_the_nominal_rate() -> None:
    """A one-sided bound at α = 5 % misses the true mean in 5 % of runs, up to simulation error."""
    generator = np.random.default_rng(2)
    runs, clusters, size = 2000, 40, 25
    labels = np.repeat(np.arange(clusters), size)
    misses = 0
    for _ in range(runs):
        effects = generator.normal(size=clusters)
        d = np.repeat(effects, size) + generator.standard_t(4, size=clusters * size)
        misses += paired_mean(d, labels).bounds(alpha=0.05)[1] < 0.0
    assert misses <= stats.binom.ppf(0.999, runs, 0.05)
    # An error that ignored the clusters would miss several times as often.
    assert misses >= stats.binom.ppf(0.001, runs, 0.03)


@pytest.mark.long
def test_minimum_detectable_effect_is_found_with_the_stated_power() -> None:
    generator = np.random.default_rng(3)
    clusters, size, runs = 60, 10, 1500
    labels = np.repeat(np.arange(clusters), size)

    def draw() -> np.ndarray:
        return np.repeat(generator.normal(size=clusters), size)

    mde = np.mean([paired_mean(draw(), labels).minimum_detectable_effect() for _ in range(200)])
    found = sum(paired_mean(draw() + mde, labels).bounds()[0] > 0.0 for _ in range(runs))
    assert found / runs == pytest.approx(0.8, abs=0.05)


@pytest.mark.parametrize("correlation", [0.0, 0.9])
def test_the_closed_form_is_the_bootstraps_variance(correlation: float) -> None:
    """Drawn as Politis and Romano describe it: circular blocks of geometric lengths."""
    rng = np.random.default_rng(5)
    m = 64
    x = rng.normal(size=m)
    for i in range(1, m):
        x[i] += correlation * x[i - 1]
    x -= x.mean()
    restart = rng.random((20_000, m)) < m ** (-1 / 3)
    restart[:, 0] = True
    starts = rng.integers(0, m, (20_000, m))
    since = np.arange(m) - np.maximum.accumulate(np.where(restart, np.arange(m), 0), axis=1)
    first = np.take_along_axis(starts, np.arange(m) - since, axis=1)
    sums = x[(first + since) % m].sum(axis=1)
    assert stationary_variance(x) == pytest.approx(sums.var(), rel=0.05)


@given(arrays(np.float64, st.integers(1, 40), elements=st.floats(-5, 5)))
@settings(deadline=None)
def test_a_variance_is_not_negative(residuals: np.ndarray) -> None:
    assert stationary_variance(residuals) >= 0.0


def test_one_long_document_says_more_by_its_blocks() -> None:
    """Two documents alone: the clusters nearly cancel, the blocks inside them do not."""
    rng = np.random.default_rng(6)
    noise = rng.normal(size=400)
    half = np.concatenate([noise, noise[::-1]])
    found = paired_mean(half, np.repeat([0, 1], 400))
    assert found.clustered_error < 1e-12 < found.block_error == found.standard_error


def test_p_values_are_those_of_the_bounds() -> None:
    found = PairedMean(mean=0.010, clustered_error=0.004, n=1000, clusters=50)
    lower, upper = found.bounds()
    assert found.p_below(upper) == pytest.approx(ALPHA)
    assert found.p_above(lower) == pytest.approx(ALPHA)
    assert found.p_below(0.0) + found.p_above(0.0) == pytest.approx(1.0)
    sure = PairedMean(mean=0.0, clustered_error=0.0, n=10, clusters=50)
    assert (sure.p_below(0.1), sure.p_below(-0.1), sure.p_above(0.1)) == (0.0, 1.0, 1.0)


def test_holm_is_holms() -> None:
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.9, 0.8]) == [1.0, 1.0]
    assert holm([]) == []


@given(st.lists(st.floats(0, 1), min_size=1, max_size=8))
def test_holm_adjusts_upwards_and_keeps_the_order(p_values: list[float]) -> None:
    adjusted = holm(p_values)
    assert all(p <= a <= 1 for p, a in zip(p_values, adjusted, strict=True))
    assert min(adjusted) <= len(p_values) * min(p_values) + 1e-12
    order = np.argsort(p_values, kind="stable")
    assert np.all(np.diff(np.array(adjusted)[order]) >= 0)


def test_a_confidence_sequence_closes_in_on_the_mean() -> None:
    rng = np.random.default_rng(8)
    sizes = rng.integers(5, 50, 400)
    means = 0.3 + rng.normal(size=400) / np.sqrt(sizes)
    lower, upper = confidence_sequence(means, sizes)
    assert np.all(np.isinf(upper[: FEWEST_CLUSTERS - 1]))
    assert np.all((lower < 0.3) & (upper > 0.3))
    assert upper[-1] - lower[-1] < upper[40] - lower[40]
    fixed = paired_mean(np.repeat(means, sizes), np.repeat(np.arange(400), sizes)).bounds()
    assert lower[-1] < fixed[0] < fixed[1] < upper[-1]  # what stopping early costs
    assert upper[-1] - lower[-1] < 3 * (fixed[1] - fixed[0])


@pytest.mark.long
@pytest.mark.parametrize("name", ["independent", "clustered", "heavy-tailed", "autocorrelated"])
def test_the_simulations_hold(tool: Callable[[str], ModuleType], name: str) -> None:
    """The large ones are one command: tools/simulate_statistics.py."""
    simulate = tool("simulate_statistics")
    assert simulate.problems(simulate.simulate(simulate.DRAWS[name], 600), 600) == []


def test_the_documented_simulation_is_of_these_data(
    root: Path, tool: Callable[[str], ModuleType]
) -> None:
    """Its figures are of 10,000 runs; here only that they are what `problems` lets pass."""
    simulate = tool("simulate_statistics")
    text = (root / "docs" / "statistics.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| ([\w-]+) \| ([\d. |]+) \|$", text, re.MULTILINE)
    figures = {name: [float(cell) for cell in cells.split("|")] for name, cells in rows}
    assert sorted(figures) == sorted(simulate.DRAWS)
    for upper, lower, sequence, family, power in figures.values():
        rates = simulate.Rates(upper, lower, sequence, power, family)
        assert simulate.problems(rates, 10_000) == []


def test_a_simulation_notices_an_error_that_is_too_small(
    tool: Callable[[str], ModuleType], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tokens of a document taken for independent ones: many false alarms, and too little power."""
    simulate = tool("simulate_statistics")

    def naive(d: np.ndarray, clusters: np.ndarray) -> PairedMean:
        return PairedMean(d.mean(), d.std() / len(d) ** 0.5, len(d), len(set(clusters)))

    monkeypatch.setattr(simulate, "paired_mean", naive)
    wrong = simulate.problems(simulate.simulate(simulate.clustered, 300), 300)
    assert [problem.partition(":")[0] for problem in wrong][:2] == ["upper bound", "lower bound"]


def test_tokens_to_decide_brings_the_bound_to_the_margin() -> None:
    found = PairedMean(mean=0.010, clustered_error=0.004, n=1000, clusters=50)
    needed = found.tokens_to_decide(margin=0.012)
    assert needed is not None
    at_that_size = PairedMean(0.010, 0.004 * np.sqrt(1000 / needed), needed, 50)
    assert at_that_size.bounds()[1] == pytest.approx(0.012, abs=1e-5)


@given(
    mean=st.floats(-1, 1),
    error=st.floats(1e-6, 1),
    margin=st.floats(1e-3, 1),
    n=st.integers(10, 10**6),
    clusters=st.integers(2, 200),
)
def test_so_many_tokens_decide_and_one_fewer_do_not(
    mean: float, error: float, margin: float, n: int, clusters: int
) -> None:
    found = PairedMean(mean, error, n, clusters)
    needed = found.tokens_to_decide(margin)
    if needed is None:
        assert mean == pytest.approx(margin, rel=1e-12)
        return

    def half_at(tokens: float) -> float:
        return PairedMean(0.0, error * np.sqrt(n / tokens), n, clusters).bounds()[1]

    gap = abs(margin - mean)
    assert half_at(needed) <= gap * (1 + 1e-9)
    assert needed == 1 or half_at(needed - 1) >= gap * (1 - 1e-9)


@pytest.mark.parametrize(
    ("d", "clusters", "message"),
    [
        (np.zeros(3), np.zeros(2), "must be one"),
        (np.zeros(3), np.zeros(3), "2 clusters at least, got 1"),
    ],
)
def test_misuse_is_refused(d: np.ndarray, clusters: np.ndarray, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        paired_mean(d, clusters)


def test_an_unpaired_error_is_that_of_two_samples() -> None:
    """What is common to both sides cancels when paired, and counts twice when not."""
    rng = np.random.default_rng(0)
    hard = rng.normal(size=400)
    one, other = hard + rng.normal(0, 0.01, 400), hard
    documents = np.arange(400)
    unpaired, paired = unpaired_mean(one, other, documents), paired_mean(one - other, documents)
    assert unpaired.mean == pytest.approx(paired.mean)
    welch = np.sqrt(one.var(ddof=1) / 400 + other.var(ddof=1) / 400)
    assert unpaired.standard_error == pytest.approx(welch, rel=1e-9)
    assert unpaired.minimum_detectable_effect() > 50 * paired.minimum_detectable_effect()


def test_a_clear_answer_needs_few_documents_and_none_at_the_margin() -> None:
    rng = np.random.default_rng(0)
    documents = np.repeat([f"d{i}" for i in range(200)], 5)
    difference = rng.normal(0, 0.1, 1000)
    difference -= difference.mean()
    assert documents_to_decide(difference, documents, 0.2) == FEWEST_CLUSTERS
    assert documents_to_decide(difference, documents, -0.2) == FEWEST_CLUSTERS
    later = documents_to_decide(difference, documents, 0.012)
    assert later is not None
    assert FEWEST_CLUSTERS < later < 200
    assert documents_to_decide(difference, documents, 0.0) is None
