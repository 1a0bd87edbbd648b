"""Perplexity by published protocols: which tokens are scored, and from how much context."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from quantgate.commands import perplexity
from quantgate.commands.perplexity import ScoredWindow, Tally, result_of
from quantgate.errors import BadInput

BOS = -1  # no id of a text
TEXTS = st.integers(0, 300).map(lambda n: list(range(n)))


def scored(windows: list[ScoredWindow]) -> list[int]:
    return [token for window in windows for token in window.ids[window.score_from :]]


def is_contiguous(window: ScoredWindow) -> bool:
    ids = [token for token in window.ids if token != BOS]
    return all(b == a + 1 for a, b in itertools.pairwise(ids))


@given(ids=TEXTS, context=st.integers(2, 40), stride=st.integers(1, 39))
def test_sliding_is_hugging_faces_loop(ids: list[int], context: int, stride: int) -> None:
    """As "Perplexity of fixed-length models" of the transformers documentation describes it."""
    stride = min(stride, context - 1)
    expected, reached = [], 0
    for begin in range(0, len(ids), stride):
        end = min(begin + context, len(ids))
        new = end - reached
        expected.append((ids[begin:end], max(1, end - begin - new)))
        reached = end
        if end == len(ids):
            break
    windows = list(perplexity.sliding(context, stride).windows(iter(ids), None))
    assert [(w.ids, w.score_from) for w in windows] == [e for e in expected if e[1] < len(e[0])]
    assert scored(windows) == ids[1:]


@given(ids=TEXTS, context=st.integers(2, 40))
def test_rolling_scores_every_token_once_as_lm_eval_does(ids: list[int], context: int) -> None:
    windows = list(perplexity.rolling(context).windows(iter(ids), BOS))
    assert scored(windows) == ids
    assert all(is_contiguous(window) and len(window.ids) <= context for window in windows)
    # Full windows score all but their first token; the last is filled up with context.
    assert all(window.score_from == 1 for window in windows[:-1])
    assert all(len(window.ids) == context for window in windows[1:])
    assert [window.ids[0] for window in windows[:1]] == [BOS] * (len(ids) > 0)


@given(ids=TEXTS, context=st.integers(2, 40), bos=st.sampled_from([None, BOS]))
def test_llama_cpp_scores_the_second_half_of_disjoint_chunks(
    ids: list[int], context: int, bos: int | None
) -> None:
    windows = list(perplexity.llama_cpp(context).windows(iter(ids), bos))
    assert len(windows) == len(ids) // context
    for number, window in enumerate(windows):
        chunk = ids[number * context : (number + 1) * context]
        assert window.ids == (chunk if bos is None else [bos, *chunk[1:]])
        assert window.score_from == context // 2 + 1


@given(ids=TEXTS, context=st.integers(2, 40), rows=st.sampled_from([None, 1, 3]))
def test_exl3_scores_rows_that_more_text_follows(
    ids: list[int], context: int, rows: int | None
) -> None:
    windows = list(perplexity.exl3(context, rows).windows(iter(ids), None))
    starts = list(range(0, len(ids) - context, context))[:rows]
    assert [window.ids for window in windows] == [ids[a : a + context] for a in starts]
    assert {window.score_from for window in windows} <= {1}


def test_a_text_is_never_held_as_a_whole() -> None:
    """Windows of an endless text come at once, by every protocol."""
    for make in perplexity.PROTOCOLS.values():
        windows = make(8).windows(itertools.count(), BOS)
        assert len(list(itertools.islice(windows, 50))) == 50
    taken = itertools.count()
    windows = (ScoredWindow([next(taken)] * 1000, 1) for _ in itertools.count())
    batch = next(perplexity.batches(windows))
    assert len(batch) == math.ceil(perplexity.BATCH_TOKENS / 1000)
    assert next(taken) == len(batch)


def test_the_result_is_the_mean_and_its_error() -> None:
    nll = np.random.default_rng(0).gamma(2.0, size=(40, 25))
    tally = Tally(bytes=4000, words=700)
    for row in nll:
        tally.add(row)
    found = result_of(tally, perplexity.rolling())
    ppl = np.exp(nll.mean())
    assert found.perplexity == pytest.approx(ppl)
    assert (found.tokens, found.windows) == (1000, 40)
    means = nll.mean(axis=1)  # windows of one length: the clustered error is that of their means
    assert found.standard_error == pytest.approx(ppl * means.std(ddof=1) / math.sqrt(40))
    assert found.standard_error_iid == pytest.approx(ppl * nll.std(ddof=1) / math.sqrt(1000))
    assert found.bits_per_byte == pytest.approx(nll.sum() / 4000 / math.log(2))
    assert found.word_perplexity == pytest.approx(math.exp(nll.sum() / 700))


def test_what_is_no_number_is_no_perplexity() -> None:
    tally = Tally()
    with pytest.raises(BadInput, match=r"no token to score by protocol exl3 .* --protocol sliding"):
        result_of(tally, perplexity.exl3())
    tally.add(np.array([1.0, np.nan, np.inf]))
    with pytest.raises(BadInput, match="2 of 3 scored tokens have a log-probability that is not"):
        result_of(tally, perplexity.exl3())
