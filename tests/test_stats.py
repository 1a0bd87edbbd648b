import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy import stats

from quantgate.stats import PairedMean, paired_mean


def test_standard_error_of_singleton_clusters_is_the_ordinary_one() -> None:
    d = np.random.default_rng(0).normal(size=200)
    found = paired_mean(d, np.arange(200))
    assert found.standard_error == pytest.approx(d.std(ddof=1) / np.sqrt(200), rel=1e-12)
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


def test_minimum_detectable_effect_is_found_with_the_stated_power() -> None:
    generator = np.random.default_rng(3)
    clusters, size, runs = 60, 10, 1500
    labels = np.repeat(np.arange(clusters), size)

    def draw() -> np.ndarray:
        return np.repeat(generator.normal(size=clusters), size)

    mde = np.mean([paired_mean(draw(), labels).minimum_detectable_effect() for _ in range(200)])
    found = sum(paired_mean(draw() + mde, labels).bounds()[0] > 0.0 for _ in range(runs))
    assert found / runs == pytest.approx(0.8, abs=0.05)


def test_tokens_to_decide_brings_the_bound_to_the_margin() -> None:
    found = PairedMean(mean=0.010, standard_error=0.004, n=1000, clusters=50)
    needed = found.tokens_to_decide(margin=0.012)
    at_that_size = PairedMean(0.010, 0.004 * np.sqrt(1000 / needed), needed, 50)
    assert at_that_size.bounds()[1] == pytest.approx(0.012, abs=1e-5)


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
