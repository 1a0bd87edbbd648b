"""The scoring core against a float64 log-softmax of the same hidden rows and head."""

import itertools

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings

from quantgate.patches.scoremode import logprob as core
from quantgate.patches.scoremode.reduction import Head


def exact(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    logits = hidden.double() @ weight.double().T
    return logits.log_softmax(dim=1).gather(1, targets[:, None])[:, 0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("vocab", [2048, 128256])
def test_scores_are_exact(dtype: torch.dtype, vocab: int) -> None:
    torch.manual_seed(0)
    rows = 64
    # Logits of unit variance: log-probabilities stay below 16, where a float32 is 1e-6 wide.
    hidden, weight = torch.randn(rows, 256).to(dtype), torch.randn(vocab, 256).to(dtype) / 16
    targets = torch.randint(vocab, (rows,))
    scores = core.score_rows(Head(weight), hidden, targets[:, None])
    error = (scores.logprob[:, 0].double() - exact(hidden, weight, targets)).abs()
    assert scores.logprob.dtype == torch.float32
    assert error.max() <= 1e-5
    assert error.mean() <= 1e-6
    assert torch.equal(scores.top1, (hidden.float() @ weight.float().T).argmax(dim=1))


@given(
    rows=st.integers(0, 70),
    vocab=st.integers(1, 90),
    width=st.integers(1, 9),
    seed=st.integers(0, 2**16),
    soft_cap=st.sampled_from([None, 5.0]),
    scale=st.sampled_from([1.0, 0.25]),
    biased=st.booleans(),
    k=st.integers(1, 4),
)
@settings(deadline=None, max_examples=150)
def test_any_shape_and_any_block_size_gives_the_same(
    rows: int,
    vocab: int,
    width: int,
    seed: int,
    soft_cap: float | None,
    scale: float,
    biased: bool,
    k: int,
) -> None:
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(rows, width, generator=generator) * 3
    weight = torch.randn(vocab, width, generator=generator)
    bias = torch.randn(vocab, generator=generator) if biased else None
    targets = torch.randint(-1, vocab, (rows, k), generator=generator)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(core, "ROW_BLOCK", 32)
        patch.setattr(core, "VOCAB_BLOCK", 7)
        head = Head(weight, bias, soft_cap=soft_cap, scale=scale)
        scores = core.score_rows(head, hidden, targets)
    logits = hidden.double() @ weight.double().T + (0 if bias is None else bias.double())
    if soft_cap is not None:
        logits = soft_cap * (logits / soft_cap).tanh()
    expected = (logits * scale).log_softmax(dim=1).gather(1, targets.clamp(min=0))
    expected = expected.where(targets >= 0, -torch.inf)
    torch.testing.assert_close(scores.logprob.double(), expected, atol=2e-5, rtol=1e-6)
    assert (scores.logprob <= 0).all()


@given(vocab=st.integers(2, 60), ranks=st.integers(2, 4), seed=st.integers(0, 2**16))
@settings(deadline=None, max_examples=50)
def test_shards_merge_to_the_whole(vocab: int, ranks: int, seed: int) -> None:
    """Every rank reduces its own columns; what they exchange gives the unsharded scores."""
    generator = torch.Generator().manual_seed(seed)
    hidden, weight = (
        torch.randn(5, 4, generator=generator),
        torch.randn(vocab, 4, generator=generator),
    )
    targets = torch.randint(vocab, (5, 3), generator=generator)
    edges = [round(vocab * rank / ranks) for rank in range(ranks + 1)]
    partial = [
        core.reduce_blocked(Head(weight[low:high], first_token=low), hidden, targets)
        for low, high in itertools.pairwise(edges)
        if high > low
    ]

    def gather(mine: torch.Tensor) -> torch.Tensor:
        assert mine.shape == (5, 3 + 3)
        numbers = [(p.maximum, p.total, p.top1.float(), *p.target.unbind(1)) for p in partial]
        return torch.cat([torch.stack(n, dim=1) for n in numbers], dim=1)

    merged = core._merge_ranks(partial[0], gather)
    whole = core.reduce_blocked(Head(weight), hidden, targets)
    for found, expected in zip(merged, whole, strict=True):
        torch.testing.assert_close(found, expected)
    assert torch.equal(merged.top1, whole.top1)


def test_nan_in_a_hidden_row_stays_visible() -> None:
    hidden = torch.randn(3, 4)
    hidden[1, 2] = torch.nan
    scores = core.score_rows(Head(torch.randn(600, 4)), hidden, torch.tensor([[0], [1], [599]]))
    assert scores.logprob[:, 0].isnan().tolist() == [False, True, False]
