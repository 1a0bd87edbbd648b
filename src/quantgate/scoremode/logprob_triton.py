"""The scoring core as one fused Triton kernel, for GPUs: product, log-sum-exp and targets at once.

Imported only where Triton is. Each program keeps a tile of logits in registers and goes through
`GROUP` columns of the vocabulary; what it writes is three numbers a row. How columns are grouped
depends on the head alone, so a row's score does not depend on what else is in the batch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import triton
import triton.language as tl

from quantgate.scoremode.logprob import Head, Reduction, merge_parts

if TYPE_CHECKING:
    import torch

GROUP = 4096  # columns one program reduces; a multiple of every tile's width
NO_COLUMN = 2**31 - 1


@dataclass(frozen=True)
class Tile:
    """The shape of one step: `rows` × `columns` of logits, `depth` of the hidden size at a time."""

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int


# float32 runs on the ordinary cores (exact products, no TF32); the 16-bit tiles fill tensor cores.
# The large tile stages (128 + 256) × 64 × 2 bytes three times, 147 KB: data-centre GPUs have it.
FLOAT32_TILE = Tile(rows=64, columns=64, depth=32, warps=4, stages=2)
SMALL_TILE = Tile(rows=64, columns=128, depth=64, warps=4, stages=2)
LARGE_TILE = Tile(rows=128, columns=256, depth=64, warps=8, stages=3)
LARGE_TILE_SHARED_MEMORY = 3 * (128 + 256) * 64 * 2


@triton.jit  # type: ignore[untyped-decorator]
def _reduce_kernel(  # type: ignore[no-untyped-def]  # Triton's own types are not Python's
    hidden_ptr, weight_ptr, bias_ptr, targets_ptr,
    maximum_ptr, total_ptr, top1_ptr, target_ptr,
    rows, hidden_size, vocab, first_token, k, groups, hidden_stride, weight_stride,
    soft_cap, scale,
    HAS_BIAS: tl.constexpr, HAS_CAP: tl.constexpr, GROUP: tl.constexpr, NO_COLUMN: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    group = tl.program_id(1)
    is_row = row < rows
    hidden_rows = hidden_ptr + row[:, None].to(tl.int64) * hidden_stride
    maximum = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    top1 = tl.zeros([ROWS], tl.int32)
    for first in range(group * GROUP, tl.minimum((group + 1) * GROUP, vocab), COLUMNS):
        column = first + tl.arange(0, COLUMNS)
        is_column = column < vocab
        weight_rows = weight_ptr + column[:, None].to(tl.int64) * weight_stride
        logits = tl.zeros([ROWS, COLUMNS], tl.float32)
        for low in range(0, hidden_size, DEPTH):
            depth = low + tl.arange(0, DEPTH)[None, :]
            inside = depth < hidden_size
            x = tl.load(hidden_rows + depth, mask=is_row[:, None] & inside, other=0.0)
            w = tl.load(weight_rows + depth, mask=is_column[:, None] & inside, other=0.0)
            logits = tl.dot(x, tl.trans(w.to(x.dtype)), logits, input_precision="ieee")
        if HAS_BIAS:
            bias = tl.load(bias_ptr + column, mask=is_column, other=0.0)
            logits += bias[None, :].to(tl.float32)
        if HAS_CAP:  # tanh(x) = 2 sigmoid(2x) - 1
            logits = soft_cap * (2.0 * tl.sigmoid(2.0 * logits / soft_cap) - 1.0)
        logits *= scale
        for j in range(k):
            wanted = tl.load(targets_ptr + row.to(tl.int64) * k + j, mask=is_row, other=-1)
            wanted = wanted - first_token
            own = tl.sum(tl.where(column[None, :] == wanted[:, None], logits, 0.0), axis=1)
            here = (wanted >= first) & (wanted < tl.minimum(first + COLUMNS, vocab))
            tl.store(target_ptr + row.to(tl.int64) * k + j, own, mask=is_row & here)
        logits = tl.where(is_column[None, :], logits, float("-inf"))
        tile_max = tl.max(logits, axis=1)
        # A tie goes to the lower token id, as in argmax over the whole row.
        best = tl.min(tl.where(logits == tile_max[:, None], column[None, :], NO_COLUMN), axis=1)
        top1 = tl.where(tile_max > maximum, best + first_token, top1)
        higher = tl.maximum(maximum, tile_max)
        total = total * tl.exp(maximum - higher) + tl.sum(tl.exp(logits - higher[:, None]), axis=1)
        maximum = higher
    out = row.to(tl.int64) * groups + group
    tl.store(maximum_ptr + out, maximum, mask=is_row)
    tl.store(total_ptr + out, total, mask=is_row)
    tl.store(top1_ptr + out, top1, mask=is_row)


def reduce_fused(head: Head, hidden: torch.Tensor, targets: torch.Tensor) -> Reduction:
    """Reduce this rank's columns in one kernel; the arguments are `score_rows`' own."""
    import torch

    # Triton's interpreter, on a CPU, would multiply the bits of bfloat16 as integers.
    if hidden.dtype != head.weight.dtype or not hidden.is_cuda:
        hidden = hidden.float()
    hidden, targets, weight = hidden.contiguous(), targets.contiguous(), head.weight.contiguous()
    (rows, hidden_size), vocab = hidden.shape, len(weight)
    groups = triton.cdiv(vocab, GROUP)
    maximum = hidden.new_empty(rows, groups, dtype=torch.float32)
    total, top1 = torch.empty_like(maximum), torch.empty_like(maximum, dtype=torch.int32)
    target = hidden.new_full(targets.shape, -torch.inf, dtype=torch.float32)
    tile = _tile(hidden)
    _reduce_kernel[(triton.cdiv(rows, tile.rows), groups)](
        hidden, weight, weight if head.bias is None else head.bias, targets,
        maximum, total, top1, target,
        rows, hidden_size, vocab, head.first_token, targets.shape[1], groups,
        hidden.stride(0), weight.stride(0),
        1.0 if head.soft_cap is None else head.soft_cap, head.scale,
        HAS_BIAS=head.bias is not None, HAS_CAP=head.soft_cap is not None,
        GROUP=GROUP, NO_COLUMN=NO_COLUMN,
        ROWS=tile.rows, COLUMNS=tile.columns, DEPTH=tile.depth,
        num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    return merge_parts(maximum, total, top1)._replace(target=target)


def _tile(hidden: torch.Tensor) -> Tile:
    """Return the tile for this dtype and device; by rule, since a search would not repeat."""
    import torch

    if hidden.dtype == torch.float32:
        return FLOAT32_TILE
    properties: Any = torch.cuda.get_device_properties(hidden.device) if hidden.is_cuda else None
    memory = getattr(properties, "shared_memory_per_block_optin", LARGE_TILE_SHARED_MEMORY)
    return LARGE_TILE if memory >= LARGE_TILE_SHARED_MEMORY else SMALL_TILE
