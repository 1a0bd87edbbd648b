"""The fused kernel against float64, and against the blocked core that it stands in for."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from quantgate.patches.scoremode import head_plan
from quantgate.patches.scoremode import logprob as core
from quantgate.patches.scoremode import logprob_triton as fused
from quantgate.patches.scoremode.head_plan import Plan, Tile
from quantgate.patches.scoremode.reduction import Head

# Log-probabilities of these shapes reach -60; float32 rounds them, and the sums, to some 1e-6.
LIMIT = 2e-5


# In nats: what the merging of groups in another order may change.
REGROUPED = 1e-6


def planned(patch: pytest.MonkeyPatch, group: int, band: int, depth_block: int) -> None:
    patch.setattr(head_plan, "plan_for", lambda *_: Plan(group, band, depth_block))


@given(
    rows=st.integers(1, 300),
    hidden_size=st.integers(1, 150),
    vocab=st.integers(2, 600),
    k=st.integers(1, 3),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    bias=st.booleans(),
    soft_cap=st.sampled_from([None, 5.0]),
    scale=st.sampled_from([1.0, 0.5]),
    first_token=st.sampled_from([0, 100]),
    group=st.sampled_from([64, 128, 256]),
    band=st.integers(1, 3),
    depth_block=st.sampled_from([32, 64, 1024]),
    seed=st.integers(0, 2**16),
)
@settings(deadline=None, max_examples=40)
def test_the_kernel_is_the_float64_log_softmax(
    rows: int,
    hidden_size: int,
    vocab: int,
    k: int,
    dtype: torch.dtype,
    bias: bool,
    soft_cap: float | None,
    scale: float,
    first_token: int,
    group: int,
    band: int,
    depth_block: int,
    seed: int,
) -> None:
    """Any shape and plan, several depth blocks, one shard of a vocabulary, padded targets."""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(rows, hidden_size, generator=generator).to(dtype)
    weight = torch.randn(vocab, hidden_size, generator=generator).to(dtype)
    targets = torch.randint(-1, vocab + 2, (rows, k), generator=generator) + first_token
    head = Head(
        weight,
        torch.randn(vocab, generator=generator).to(dtype) if bias else None,
        first_token=first_token,
        soft_cap=soft_cap,
        scale=scale,
    )
    with pytest.MonkeyPatch.context() as patch:
        planned(patch, group, band, depth_block)
        assert core._reduction_for(hidden) is fused.reduce_fused
        scores = core.score_rows(head, hidden, targets)
        patch.setattr(core, "_reduction_for", lambda _: core.reduce_blocked)
        blocked = core.score_rows(head, hidden, targets)
    logits = hidden.double() @ weight.double().T
    if head.bias is not None:
        logits += head.bias.double()
    if soft_cap is not None:
        logits = soft_cap * (logits / soft_cap).tanh()
    whole = (logits * scale).log_softmax(dim=1)
    column = targets - first_token
    inside = (column >= 0) & (column < vocab)
    expected = whole.gather(1, column.clamp(0, vocab - 1)).where(inside, -torch.inf)
    assert torch.equal(scores.logprob.isinf(), ~inside)
    torch.testing.assert_close(scores.logprob.double(), expected, atol=LIMIT, rtol=1e-6)
    torch.testing.assert_close(scores.logprob, blocked.logprob, atol=LIMIT, rtol=1e-6)
    best = whole.gather(1, (scores.top1 - first_token).unsqueeze(1)).squeeze(1)
    torch.testing.assert_close(best, whole.amax(dim=1), atol=LIMIT, rtol=0)
    torch.testing.assert_close(scores.top1_logprob.double(), best, atol=LIMIT, rtol=1e-6)


@given(
    rows=st.integers(1, 300),
    hidden_size=st.integers(1, 150),
    vocab=st.integers(2, 1000),
    k=st.integers(1, 3),
    bias=st.booleans(),
    soft_cap=st.sampled_from([None, 5.0]),
    seed=st.integers(0, 2**16),
)
@settings(deadline=None, max_examples=12)
def test_a_score_does_not_depend_on_the_plan(
    rows: int, hidden_size: int, vocab: int, k: int, bias: bool, soft_cap: float | None, seed: int
) -> None:
    """The plan follows the number of rows: a row scores the same, within rounding, in any batch.

    Products of such small numbers are exact, so that only the merging of groups rounds, and half of
    the tokens tie with another one.
    """
    generator = torch.Generator().manual_seed(seed)
    hidden = (torch.randn(rows, hidden_size, generator=generator) * 8).round() / 8
    weight = (torch.randn(vocab, hidden_size, generator=generator) * 64 / hidden_size**0.5).round()
    weight /= 64
    half = (vocab + 1) // 2
    weight[half:] = weight[: vocab - half].clone()
    head = Head(
        weight, torch.randn(vocab, generator=generator) if bias else None, soft_cap=soft_cap
    )
    targets = torch.randint(vocab, (rows, k), generator=generator)
    reduced = []
    for group, band in ((64, 1), (256, 2), (4096, 16)):
        with pytest.MonkeyPatch.context() as patch:
            planned(patch, group, band, 64)
            reduced.append(core.score_rows(head, hidden, targets))
    for other in reduced[1:]:
        torch.testing.assert_close(other.logprob, reduced[0].logprob, atol=REGROUPED, rtol=0)
        assert torch.equal(other.top1, reduced[0].top1)
    assert bias or (reduced[0].top1 < half).all()


@given(
    rows=st.integers(1, 100),
    hidden_size=st.integers(1, 40).map(lambda n: 4 * n),
    vocab=st.integers(2, 300),
    depth_block=st.sampled_from([32, 1024]),
    seed=st.integers(0, 2**16),
)
@settings(deadline=None, max_examples=12)
def test_tma_reads_what_addresses_read(
    rows: int, hidden_size: int, vocab: int, depth_block: int, seed: int
) -> None:
    """Bit for bit, also where a tile goes beyond the last row, token or column of the depth."""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(rows, hidden_size, generator=generator)
    head = Head(torch.randn(vocab, hidden_size, generator=generator))
    targets = torch.randint(vocab, (rows, 2), generator=generator)
    tile, plan = Tile(32, 64, 32, warps=4, stages=2), Plan(128, 2, depth_block)
    assert fused._tma_reads(hidden)
    found = [
        fused.reduce_planned(head, hidden, targets, replace(tile, by_tma=by_tma), plan)
        for by_tma in (False, True)
    ]
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)


def test_what_tma_cannot_read_is_read_by_address() -> None:
    rows = torch.randn(5, 33)
    assert not fused._tma_reads(rows)  # the second row starts at byte 132
    assert not fused._tma_reads(torch.randn(9)[1:].view(2, 4))
    assert not fused._tma_reads(torch.randn(0, 32))
    head, targets = Head(torch.randn(70, 33)), torch.zeros(5, 1).long()
    tile, plan = Tile(32, 64, 32, warps=4, stages=2, by_tma=True), Plan(128, 2)
    found = fused.reduce_planned(head, rows, targets, tile, plan)
    torch.testing.assert_close(found.maximum, (rows @ head.weight.T).amax(dim=1))


def test_a_tie_goes_to_the_lower_token_in_both_cores() -> None:
    hidden, weight = torch.ones(2, 4), torch.zeros(1000, 4)
    weight[[7, 70, 700]] = 1.0
    for reduce in (fused.reduce_fused, core.reduce_blocked):
        assert reduce(Head(weight), hidden, torch.zeros(2, 1).long()).top1.tolist() == [7, 7]


def test_a_score_does_not_depend_on_the_other_rows() -> None:
    """Bit for bit: rows alone, and among others, go through the same sums."""
    hidden, weight = torch.randn(90, 33), torch.randn(5000, 33)
    targets = torch.randint(5000, (90, 1))
    whole = core.score_rows(Head(weight), hidden, targets).logprob
    # Row 64 is the first of its tile in both: numpy's product differs from row to row of a tile.
    alone = core.score_rows(Head(weight), hidden[64:65], targets[64:65]).logprob
    assert torch.equal(whole[64:65], alone)


@pytest.mark.parametrize("depth", [2, 40, 99])
def test_nan_in_a_hidden_row_stays_visible(depth: int, monkeypatch: pytest.MonkeyPatch) -> None:
    planned(monkeypatch, 256, 1, 32)
    hidden = torch.randn(3, 100)
    hidden[1, depth] = torch.nan
    weight = torch.randn(600, 100)
    scores = core.score_rows(Head(weight), hidden, torch.tensor([[0], [1], [5]]))
    assert scores.logprob[:, 0].isnan().tolist() == [False, True, False]


@pytest.mark.parametrize("number", [float("inf"), float("-inf")])
@pytest.mark.parametrize("depth", [0, 40, 99])
def test_an_infinite_logit_is_never_a_plausible_score(
    number: float, depth: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the first, the second or the last block of the depth."""
    planned(monkeypatch, 256, 1, 32)
    hidden, weight = torch.ones(1, 100), torch.zeros(20, 100)
    weight[3, depth] = number
    targets = torch.tensor([[3, 4]])
    fused_scores = core.score_rows(Head(weight), hidden, targets).logprob
    parts = core.reduce_blocked(Head(weight), hidden, targets)
    blocked = parts.target - (parts.maximum + parts.total.log()).unsqueeze(1)
    torch.testing.assert_close(fused_scores, blocked, equal_nan=True)
