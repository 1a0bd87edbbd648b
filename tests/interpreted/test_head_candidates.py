"""cuBLAS's product in blocks, a candidate of tools/bench_head.py, against the scoring core.

On a CPU a product in float32 stands in for cuBLAS's; the kernel that folds the blocks is the same.
"""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gpu import head_candidates
from quantgate.patches.scoremode import logprob as core
from quantgate.patches.scoremode.reduction import Head


@given(
    rows=st.integers(1, 40),
    depth=st.integers(1, 20),
    parts=st.sampled_from([1, 2, 4]),
    vocab=st.integers(2, 300),
    k=st.integers(1, 3),
    height=st.integers(1, 50),
    width=st.integers(1, 200),
    seed=st.integers(0, 2**16),
)
@settings(deadline=None, max_examples=15)
def test_blocks_of_cublas_give_what_the_core_gives(
    rows: int, depth: int, parts: int, vocab: int, k: int, height: int, width: int, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(rows, depth * parts, generator=generator).bfloat16()
    weight = torch.randn(vocab, depth * parts, generator=generator).bfloat16()
    targets = torch.randint(-1, vocab + 2, (rows, k), generator=generator)
    head = Head(weight)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(head_candidates, "FOLD_COLUMNS", 64)
        found = head_candidates.reduce_in_blocks(head, hidden, targets, height, width, parts)
    expected = core.reduce_blocked(head, hidden, targets)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, atol=2e-5, rtol=1e-5)


def test_a_tie_goes_to_the_lower_token() -> None:
    hidden, weight = torch.ones(2, 4), torch.zeros(1000, 4)
    weight[[7, 70, 700]] = 1.0
    head, targets = Head(weight), torch.zeros(2, 1).long()
    found = head_candidates.reduce_in_blocks(head, hidden, targets, 2, 64, 2)
    assert found.top1.tolist() == [7, 7]


def test_every_candidate_has_a_name_of_its_own() -> None:
    hidden = torch.empty(8192, 4096, dtype=torch.bfloat16, device="meta")
    names = [name for name, _ in head_candidates.reductions(hidden, 128256)]
    assert len(set(names)) == len(names) > 15
