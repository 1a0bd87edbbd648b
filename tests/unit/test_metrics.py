"""What models are for, as numbers: entity F1, rankings, retrieval, and how sure a loss is."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from quantgate.judging import metrics
from quantgate.subject.probe import Probe, Window


def probe_of(lengths: list[int]) -> Probe:
    windows = tuple(Window(f"d{i}", "s", 0, (3,) * n, "") for i, n in enumerate(lengths))
    return Probe("p", 5, windows, "token_classify", ("O", "A", "B"))


def everything(probe: Probe) -> NDArray[np.int64]:
    return np.arange(len(probe.windows))


def test_an_entity_is_found_where_its_ends_and_its_label_are() -> None:
    probe = probe_of([8, 3])
    #             A A . B . B B A   . A A
    expected = np.array([1, 1, 0, 2, 0, 2, 2, 1, 0, 1, 1], float)
    found = np.array([1, 0, 0, 2, 0, 2, 2, 1, 0, 1, 1], float)
    f1 = metrics.entity_f1(found, expected, probe, outside=0)
    # 5 entities each; the first one ends too early.
    assert f1.of(everything(probe)) == pytest.approx(2 * 4 / 10)
    assert f1.of(np.array([1, 1])) == 1.0
    assert metrics.entity_f1(expected, expected, probe, 0).of(everything(probe)) == 1.0


def test_what_is_not_judged_does_not_count() -> None:
    probe = probe_of([4])
    expected = np.array([np.nan, 1, 1, 0])
    found = np.array([2.0, 1, 1, 0])
    assert metrics.entity_f1(found, expected, probe, 0).of(everything(probe)) == 1.0
    right = metrics.accuracy("accuracy", np.array([2.0, 1, 0, 0]), expected, probe)
    assert right.of(everything(probe)) == pytest.approx(2 / 3)


@given(st.lists(st.integers(0, 3), min_size=1, max_size=40), st.data())
@settings(deadline=None)
def test_entity_f1_is_symmetric_and_between_0_and_1(labels: list[int], data: st.DataObject) -> None:
    probe = probe_of([len(labels)])
    other = data.draw(st.lists(st.integers(0, 3), min_size=len(labels), max_size=len(labels)))
    a, b = np.array(labels, float), np.array(other, float)
    one, two = (
        metrics.entity_f1(x, y, probe, 0).of(everything(probe)) for x, y in ((a, b), (b, a))
    )
    assert one == two
    assert 0.0 <= one <= 1.0
    assert (one == 1.0) >= (labels == other)


def test_ranking_accuracy_counts_pairs_of_other_grades() -> None:
    grades = np.array([0.0, -1, -1, -2])
    ranking = metrics.ranking_accuracy(np.array([3.0, 1, 2, 2]), grades)
    # (0,1) (0,2) (0,3) right, (1,3) wrong, (2,3) a tie; (1,2) is of one grade.
    assert ranking.of(np.arange(4)) == pytest.approx(3.5 / 5)
    assert ranking.of(np.array([1, 2])) == 1.0


@given(
    st.integers(1, 5), st.integers(1, 5), st.integers(1, 6), st.integers(2, 9), st.integers(0, 99)
)
@settings(deadline=None)
def test_max_sim_is_that_of_the_definition(
    queries: int, documents: int, tokens: int, width: int, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    q, d = (
        [rng.normal(size=(tokens, width)) for _ in range(count)] for count in (queries, documents)
    )
    found = metrics.max_sim(q, d)
    assert found.shape == (queries, documents)
    expected = sum(max(float(row @ other) for other in d[-1]) for row in q[0])
    assert found[0, -1] == pytest.approx(expected)


def test_a_loss_is_shown_with_how_sure_it_is() -> None:
    rng = np.random.default_rng(0)
    probe = probe_of([20] * 60)
    expected = rng.integers(0, 3, 1200).astype(float)
    worse = np.where(rng.random(1200) < 0.1, (expected + 1) % 3, expected)
    perfect = metrics.accuracy("accuracy", expected, expected, probe)
    loss = metrics.paired_loss(metrics.accuracy("accuracy", worse, expected, probe), perfect, 60)
    wrong = float(np.mean(worse != expected))
    assert loss.loss == pytest.approx(wrong)
    assert loss.lower < wrong < loss.upper
    # The standard error of a mean of 60 documents' own rates.
    rates = (worse != expected).reshape(60, 20).mean(axis=1)
    bootstrapped = (loss.standard_error**2 - 1 / 62**2) ** 0.5
    assert bootstrapped == pytest.approx(rates.std(ddof=1) / 60**0.5, rel=0.1)
    assert loss.minimum_detectable_effect() == pytest.approx(2.486 * loss.standard_error, rel=1e-3)


@pytest.mark.parametrize("documents", [30, 200])
def test_no_change_is_no_proof(documents: int) -> None:
    """As many documents as change nothing leave room for a loss that they would not show."""
    probe = probe_of([5] * documents)
    labels = np.zeros(5 * documents)
    same = metrics.accuracy("accuracy", labels, labels, probe)
    nothing = metrics.paired_loss(same, same, documents)
    assert nothing.loss == 0.0
    assert nothing.upper == pytest.approx(1.645 / (documents + 2), rel=1e-3)
    assert nothing.minimum_detectable_effect() > nothing.upper


def test_retrieval_finds_its_own_document() -> None:
    similarity = np.array([[3.0, 1, 2], [5, 4, 3], [0, 1, 2]])
    assert metrics.retrieval_accuracy(similarity).of(np.arange(3)) == pytest.approx(2 / 3)
