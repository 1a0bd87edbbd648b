"""The scoring core as one fused Triton kernel for GPUs: product, log-sum-exp and targets.

Import this only if Triton is installed. Each program keeps a tile of logits in registers, goes
through one group of columns of the vocabulary, and writes three numbers per row. `head_plan`
chooses the groups: smaller ones for few rows, so that the whole chip works. Grouping does not
change a logit; merging groups moves a score by at most the last bit of its float32.

On Hopper the tensor memory accelerator (TMA) fetches the tiles, which takes no registers and few
instructions. An H200 then takes 1.14 × as long as for cuBLAS's product at hidden size 896, where it
took 1.60 × with loads by address.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from quantgate.patches.scoremode import head_plan
from quantgate.patches.scoremode.head_plan import Plan, Tile
from quantgate.patches.scoremode.reduction import Head, Reduction, merge_parts

if TYPE_CHECKING:
    import torch

NO_COLUMN = 2**31 - 1
# What an address and a row's length must be a multiple of for TMA (CUDA driver API, "tensor maps").
TMA_BYTES = 16


@triton.jit
def _add_kept(part, kept):  # type: ignore[no-untyped-def]  # Triton's own types are not Python's
    """Return the even and the odd columns of part [ROWS, COLUMNS] plus their kept upper halves.

    `kept` [ROWS, COLUMNS / 2] holds two bfloat16 in each uint32.
    """
    even, odd = tl.split(part.reshape(part.shape[0], part.shape[1] // 2, 2))
    even += (kept << 16).to(tl.float32, bitcast=True)
    odd += ((kept >> 16) << 16).to(tl.float32, bitcast=True)
    return even, odd


@triton.jit
def _rest_of(whole, high):  # type: ignore[no-untyped-def]
    """Return float32 sums minus their upper 16 bits; 0 for infinity and NaN."""
    rest = whole - (high << 16).to(tl.float32, bitcast=True)
    return tl.where(rest == rest, rest, 0.0)


@triton.jit
def _keep(part, kept):  # type: ignore[no-untyped-def]
    """Move sums out of the accumulator: their upper 16 bits into `kept`; return both.

    No bit is lost. The remainder is less than 1/128 of a sum, so tensor cores truncate that much
    less. Whole float32 sums would need twice the registers, more than a thread has in the large
    tile.
    """
    even, odd = _add_kept(part, kept)
    even_high = even.to(tl.uint32, bitcast=True) >> 16
    odd_high = odd.to(tl.uint32, bitcast=True) >> 16
    rest = tl.join(_rest_of(even, even_high), _rest_of(odd, odd_high))
    return rest.reshape(part.shape[0], part.shape[1]), even_high | (odd_high << 16)


@triton.jit  # type: ignore[untyped-decorator]
def _product(  # type: ignore[no-untyped-def]
    hidden, weight, first_row, first_column, rows, vocab, part, low, high, hidden_size,
    hidden_stride, weight_stride, DEPTH: tl.constexpr, BY_TMA: tl.constexpr,
):  # fmt: skip
    """Add the product over the depth range [low, high) to part [ROWS, COLUMNS], and return it.

    TMA reads zeros where the tensors end.
    """
    if not BY_TMA:
        row = first_row + tl.arange(0, part.shape[0])[:, None]
        column = first_column + tl.arange(0, part.shape[1])[:, None]
        hidden_rows = hidden + row.to(tl.int64) * hidden_stride
        weight_rows = weight + column.to(tl.int64) * weight_stride
    for start in range(low, high, DEPTH):
        if BY_TMA:
            x = hidden.load([first_row, start])
            w = weight.load([first_column, start])
        else:
            depth = start + tl.arange(0, DEPTH)[None, :]
            inside = depth < hidden_size
            x = tl.load(hidden_rows + depth, mask=(row < rows) & inside, other=0.0)
            w = tl.load(weight_rows + depth, mask=(column < vocab) & inside, other=0.0)
        part = tl.dot(x, tl.trans(w.to(x.dtype)), part, input_precision="ieee")
    return part


@triton.jit
def _exp(x):  # type: ignore[no-untyped-def]
    """Return exp(x), 0 below 2^-126: unlike exp, exp2 spends nothing on denormal numbers."""
    return tl.exp2(x * 1.4426950408889634)


@triton.jit
def _place(program, row_tiles, groups, band):  # type: ignore[no-untyped-def]
    """Return a program's tile of rows and group of columns; a band's rows vary fastest."""
    first_tile = program // (band * groups) * band
    width = tl.minimum(band, row_tiles - first_tile)
    within = program - first_tile * groups
    return first_tile + within % width, within // width


# Triton compiles a kernel again for every new property of an argument that it specializes on, such
# as 1 or a multiple of 16. Numbers that change from step to step must not be among them.
@triton.jit(  # type: ignore[untyped-decorator]
    do_not_specialize=["rows", "vocab", "first_token", "k", "group_columns", "groups", "band"]
)
def _reduce_kernel(  # type: ignore[no-untyped-def]
    hidden, weight, bias_ptr, targets_ptr,
    maximum_ptr, total_ptr, top1_ptr, target_ptr,
    rows, hidden_size, vocab, first_token, k, group_columns, groups, band,
    hidden_stride, weight_stride, soft_cap, scale,
    BLOCKS: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_CAP: tl.constexpr, HAS_SCALE: tl.constexpr,
    NO_COLUMN: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
    DEPTH_BLOCK: tl.constexpr, BY_TMA: tl.constexpr,
):  # fmt: skip
    """Reduce one tile of rows over one group of columns.

    `hidden` and `weight` are descriptors for TMA, or addresses.
    """
    row_tile, group = _place(tl.program_id(0), tl.cdiv(rows, ROWS), groups, band)
    row = row_tile * ROWS + tl.arange(0, ROWS)
    is_row = row < rows
    maximum = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    top1 = tl.zeros([ROWS], tl.int32)
    last = tl.minimum((group + 1) * group_columns, vocab)
    for first in range(group * group_columns, last, COLUMNS):
        column = first + tl.arange(0, COLUMNS)
        logits = tl.zeros([ROWS, COLUMNS], tl.float32)
        kept = tl.zeros([ROWS, COLUMNS // 2], tl.uint32)
        for low in range(0, hidden_size, DEPTH_BLOCK):
            high = tl.minimum(low + DEPTH_BLOCK, hidden_size)
            logits = _product(
                hidden, weight, row_tile * ROWS, first, rows, vocab, logits, low, high,
                hidden_size, hidden_stride, weight_stride, DEPTH, BY_TMA,
            )  # fmt: skip
            if BLOCKS:
                logits, kept = _keep(logits, kept)
        if BLOCKS:
            even, odd = _add_kept(logits, kept)
            logits = tl.join(even, odd).reshape(ROWS, COLUMNS)
        if HAS_BIAS:
            bias = tl.load(bias_ptr + column, mask=column < vocab, other=0.0)
            logits += bias[None, :].to(tl.float32)
        if HAS_CAP:  # tanh(x) = 2 sigmoid(2x) - 1
            logits = soft_cap * (2.0 * tl.sigmoid(2.0 * logits / soft_cap) - 1.0)
        if HAS_SCALE:
            logits *= scale
        if first + COLUMNS > vocab:
            logits = tl.where((column < vocab)[None, :], logits, float("-inf"))
        for j in range(k):
            wanted = tl.load(targets_ptr + row.to(tl.int64) * k + j, mask=is_row, other=-1)
            wanted -= first_token
            here = (wanted >= first) & (wanted < tl.minimum(first + COLUMNS, vocab)) & is_row
            # Few tiles hold a target; searching all of them would take as long as the sum.
            if tl.max(here.to(tl.int32), axis=0) > 0:
                own = tl.where(column[None, :] == wanted.to(tl.int32)[:, None], logits, 0.0)
                tl.store(target_ptr + row.to(tl.int64) * k + j, tl.sum(own, axis=1), mask=here)
        tile_max = tl.max(logits, axis=1)
        # Ties go to the lower token id, as in argmax over the whole row.
        best = tl.min(tl.where(logits == tile_max[:, None], column[None, :], NO_COLUMN), axis=1)
        top1 = tl.where(tile_max > maximum, best + first_token, top1)
        higher = tl.maximum(maximum, tile_max)
        total = total * _exp(maximum - higher) + tl.sum(_exp(logits - higher[:, None]), axis=1)
        maximum = higher
    out = row.to(tl.int64) * groups + group
    tl.store(maximum_ptr + out, maximum, mask=is_row)
    tl.store(total_ptr + out, total, mask=is_row)
    tl.store(top1_ptr + out, top1, mask=is_row)


def reduce_fused(head: Head, hidden: torch.Tensor, targets: torch.Tensor) -> Reduction:
    """Reduce this rank's columns in one kernel; same arguments as `score_rows`."""
    # Triton's interpreter on a CPU would multiply bfloat16 bit patterns as integers.
    if hidden.dtype != head.weight.dtype or not hidden.is_cuda:
        hidden = hidden.float()
    plan = head_plan.plan_for(len(hidden), hidden.shape[1], len(head.weight))
    return reduce_planned(head, hidden, targets, tile_of(hidden), plan)


def reduce_planned(
    head: Head, hidden: torch.Tensor, targets: torch.Tensor, tile: Tile, plan: Plan
) -> Reduction:
    """Reduce this rank's columns by a plan; hidden is in the weight's dtype or in float32."""
    import torch

    hidden, targets, weight = hidden.contiguous(), targets.contiguous(), head.weight.contiguous()
    (rows, hidden_size), vocab = hidden.shape, len(weight)
    groups = triton.cdiv(vocab, plan.group)
    maximum = hidden.new_empty(rows, groups, dtype=torch.float32)
    total, top1 = torch.empty_like(maximum), torch.empty_like(maximum, dtype=torch.int32)
    target = hidden.new_full(targets.shape, -torch.inf, dtype=torch.float32)
    by_tma = tile.by_tma and _tma_reads(hidden) and _tma_reads(weight)
    _reduce_kernel[(triton.cdiv(rows, tile.rows) * groups,)](
        TensorDescriptor.from_tensor(hidden, [tile.rows, tile.depth]) if by_tma else hidden,
        TensorDescriptor.from_tensor(weight, [tile.columns, tile.depth]) if by_tma else weight,
        weight if head.bias is None else head.bias, targets,
        maximum, total, top1, target,
        rows, hidden_size, vocab, head.first_token, targets.shape[1],
        plan.group, groups, plan.band, hidden.stride(0), weight.stride(0),
        1.0 if head.soft_cap is None else head.soft_cap, head.scale,
        BLOCKS=hidden_size > plan.depth_block, HAS_BIAS=head.bias is not None,
        HAS_CAP=head.soft_cap is not None, HAS_SCALE=head.scale != 1.0, NO_COLUMN=NO_COLUMN,
        ROWS=tile.rows, COLUMNS=tile.columns, DEPTH=tile.depth, DEPTH_BLOCK=plan.depth_block,
        BY_TMA=by_tma, num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    return merge_parts(maximum, total, top1)._replace(target=target)


def _tma_reads(tensor: torch.Tensor) -> bool:
    """Whether TMA can read it: rows start at multiples of 16 bytes, and there is one at least."""
    starts = (tensor.data_ptr(), tensor.stride(0) * tensor.element_size())
    return len(tensor) > 0 and all(start % TMA_BYTES == 0 for start in starts)


def tile_of(hidden: torch.Tensor) -> Tile:
    """Return the tile for hidden states of this dtype on this device."""
    import torch

    device: Any = hidden.device
    capability = torch.cuda.get_device_capability(device)[0] if hidden.is_cuda else None
    return head_plan.tile_for(hidden.element_size(), capability)
