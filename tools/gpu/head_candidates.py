"""Ways to score rows with a head on a GPU, for `tools/bench_head.py` to choose among.

Beside the fused kernel with other tiles and plans: cuBLAS's own product to float32 in blocks, each
folded into the running log-sum-exp by a small kernel. Score mode takes the fused kernel only, since
cuBLAS chooses its algorithm by the shape: what else is in a batch could change a row's score.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl

from quantgate.patches.scoremode import head_plan
from quantgate.patches.scoremode import logprob_triton as fused
from quantgate.patches.scoremode.head_plan import Plan, Tile
from quantgate.patches.scoremode.reduction import Head, Reduction, Scores, scores_of

if TYPE_CHECKING:
    from torch import Tensor

Reduce = Callable[[Head, "Tensor", "Tensor"], Reduction]
FOLD_COLUMNS = 4096
# Two programs of the last fit on one multiprocessor, so that one can multiply while the other adds
# up exponentials.
TILES = (
    head_plan.LARGE_TILE,
    head_plan.MEDIUM_TILE,
    replace(head_plan.LARGE_TILE, stages=3),
    replace(head_plan.LARGE_TILE, stages=3, by_tma=False),
    Tile(rows=256, columns=128, depth=64, warps=8, stages=3, by_tma=True),
    Tile(rows=128, columns=128, depth=64, warps=4, stages=3, by_tma=True),
)
# Rows × columns of a block, and how many parts the depth is in.
BLOCKS = (
    (2048, 4096, 1), (4096, 8192, 1), (8192, 16384, 1), (1024, 8192, 1), (64, 131072, 1),
    (2048, 2048, 2), (2048, 1024, 4), (2048, 4096, 4), (8192, 4096, 4), (1024, 2048, 4),
    (64, 32768, 4),
)  # fmt: skip
MOST_BANDS = 8
ONE_CHAIN = 2**30
ONE_BAND = 2**20


@triton.jit  # type: ignore[untyped-decorator]
def _fold_kernel(  # type: ignore[no-untyped-def]  # Triton's own types are not Python's
    logits_ptr, targets_ptr, maximum_ptr, total_ptr, top1_ptr, target_ptr,
    first, columns, k, part_stride, PARTS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    logits_row = logits_ptr + row * columns
    maximum = tl.load(maximum_ptr + row)
    total = tl.load(total_ptr + row)
    top1 = tl.load(top1_ptr + row)
    for j in range(k):
        wanted = tl.load(targets_ptr + row * k + j) - first
        if (wanted >= 0) & (wanted < columns):
            own = tl.load(logits_row + wanted)
            for part in tl.static_range(1, PARTS):
                own += tl.load(logits_row + part * part_stride + wanted)
            tl.store(target_ptr + row * k + j, own)
    for start in range(0, columns, COLUMNS):
        column = start + tl.arange(0, COLUMNS)
        inside = column < columns
        logits = tl.load(logits_row + column, mask=inside, other=float("-inf"))
        for part in tl.static_range(1, PARTS):
            logits += tl.load(logits_row + part * part_stride + column, mask=inside, other=0.0)
        largest = tl.max(logits, axis=0)
        best = tl.min(tl.where(logits == largest, column, 2**31 - 1), axis=0)
        top1 = tl.where(largest > maximum, best + first, top1)
        higher = tl.maximum(maximum, largest)
        total = total * tl.exp(maximum - higher) + tl.sum(tl.exp(logits - higher), axis=0)
        maximum = higher
    tl.store(maximum_ptr + row, maximum)
    tl.store(total_ptr + row, total)
    tl.store(top1_ptr + row, top1)


def product(hidden: Tensor, weight: Tensor, parts: int) -> Tensor:
    """Return hidden [n, H] times weight [columns, H]ᵀ in parts of the depth: [parts, n, columns].

    To float32 without rounding to the dtype between; a CPU has no such product of bfloat16.
    """
    x = hidden.view(len(hidden), parts, -1).transpose(0, 1)
    y = weight.view(len(weight), parts, -1).permute(1, 2, 0)
    if hidden.is_cuda:
        return torch.bmm(x, y, out_dtype=torch.float32)
    return torch.bmm(x.float(), y.float())


def reduce_in_blocks(
    head: Head, hidden: Tensor, targets: Tensor, rows: int, columns: int, parts: int
) -> Reduction:
    """Reduce by cuBLAS's product in blocks of rows × columns; a head without bias, cap and scale.

    Each of the depth's `parts` is a product of its own, and the kernel that reduces adds them up.
    """
    n, vocab = len(hidden), len(head.weight)
    running = Reduction(
        maximum=hidden.new_full((n,), -torch.inf, dtype=torch.float32),
        total=hidden.new_zeros(n, dtype=torch.float32),
        target=hidden.new_full(targets.shape, -torch.inf, dtype=torch.float32),
        top1=torch.zeros_like(targets[:, 0], dtype=torch.int32),
    )
    for start in range(0, n, rows):
        own = slice(start, min(start + rows, n))
        for first in range(0, vocab, columns):
            logits = product(hidden[own], head.weight[first : first + columns], parts)
            _fold_kernel[(logits.shape[1],)](
                logits, targets[own], running.maximum[own], running.total[own],
                running.top1[own], running.target[own],
                first, logits.shape[2], targets.shape[1], logits.stride(0),
                PARTS=parts, COLUMNS=FOLD_COLUMNS, num_warps=8,
            )  # fmt: skip
    return running._replace(top1=running.top1.long())


def score_by(reduce: Reduce, head: Head, hidden: Tensor, targets: Tensor) -> Scores:
    """Score rows as `score_rows` does, by another reduction."""
    return scores_of(reduce(head, hidden, targets))


def reductions(hidden: Tensor, vocab: int) -> Iterator[tuple[str, Reduce]]:
    """Yield what can be measured for hidden [n, H]: a name, and what reduces.

    What the rule chooses is not among them: it is score mode itself.
    """
    rows, hidden_size = hidden.shape
    plan, tile = head_plan.plan_for(rows, hidden_size, vocab), fused.tile_of(hidden)
    for other in TILES:
        if other != tile:
            step = f"{other.rows} × {other.columns}, {other.warps} warps, {other.stages} stages"
            how = f"{step}, {'TMA' if other.by_tma else 'by address'}"
            yield f"fused, {how}", partial(fused.reduce_planned, tile=other, plan=plan)
    for name, changed in _other_plans(plan):
        if changed != plan:
            yield f"fused, {name}", partial(fused.reduce_planned, tile=tile, plan=changed)
    for height, width, parts in BLOCKS:
        if hidden_size % parts == 0 and height <= rows <= MOST_BANDS * height:
            name = f"cuBLAS {height:,} × {width:,}, depth in {parts}"
            yield name, partial(reduce_in_blocks, rows=height, columns=width, parts=parts)


def _other_plans(plan: Plan) -> Iterator[tuple[str, Plan]]:
    yield "one chain", replace(plan, depth_block=ONE_CHAIN)
    for depth in (512, 2048):
        yield f"depth blocks of {depth:,}", replace(plan, depth_block=depth)
    for group in (256, 1024, 4096):
        yield f"groups of {group:,}", replace(plan, group=group)
    yield "one band", replace(plan, band=ONE_BAND)
