"""The scoring core: exact log-probabilities from hidden rows and a language-model head.

*Exact* means the log-softmax, in float32, of the logits that the head gives for a hidden row, with
the product accumulated in float32 and never rounded to the serving dtype. `[rows, vocab]` is never
materialized: the vocabulary is processed in blocks that stay in cache, with a running maximum and
sum. On a GPU `logprob_triton` does the same in one fused kernel.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from quantgate.patches.scoremode.reduction import Head, Reduction, Scores, merge_parts, scores_of

if TYPE_CHECKING:
    import torch

# 1024 rows × 512 columns of float32 are 2 MiB: a block of logits stays in a core's cache, and each
# block of the head is converted to float32 once for all of these rows.
ROW_BLOCK = 1024
VOCAB_BLOCK = 512
DEPTH_BLOCK = 128


def score_rows(head: Head, hidden: torch.Tensor, targets: torch.Tensor) -> Scores:
    """Score `targets` (int64 [n, k]) as predictions from `hidden` [n, H], any floating dtype.

    A target outside the vocabulary, such as the padding value -1, scores -inf.
    """
    reduced = _reduction_for(hidden)(head, hidden, targets)
    if head.all_gather is not None:
        reduced = _merge_ranks(reduced, head.all_gather)
    return scores_of(reduced)


def _reduction_for(
    hidden: torch.Tensor,
) -> Callable[[Head, torch.Tensor, torch.Tensor], Reduction]:
    """Return the fused kernel if Triton can run: on a GPU, or anywhere in its interpreter."""
    import importlib.util
    import os

    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    if (hidden.is_cuda or interpreted) and importlib.util.find_spec("triton") is not None:
        from quantgate.patches.scoremode.logprob_triton import reduce_fused

        return reduce_fused
    return reduce_blocked


def reduce_blocked(head: Head, hidden: torch.Tensor, targets: torch.Tensor) -> Reduction:
    """Reduce this rank's columns in plain torch, on any device."""
    import torch

    starts = range(0, max(1, len(hidden)), ROW_BLOCK)
    rows = [slice(start, start + ROW_BLOCK) for start in starts]
    blocks = [_reduce_rows(head, hidden[own].float(), targets[own]) for own in rows]
    return Reduction(*(torch.cat(parts) for parts in zip(*blocks, strict=True)))


def _reduce_rows(head: Head, hidden: torch.Tensor, targets: torch.Tensor) -> Reduction:
    import torch

    depths = range(0, hidden.shape[1], DEPTH_BLOCK)
    blocks = [hidden[:, depth : depth + DEPTH_BLOCK].contiguous() for depth in depths]
    running = Reduction(
        maximum=hidden.new_full((len(targets),), -torch.inf),
        total=hidden.new_zeros(len(targets)),
        target=hidden.new_full(targets.shape, -torch.inf),
        top1=torch.zeros_like(targets[:, 0]),
    )
    for start, stop in _column_blocks(head):
        logits = _logits(head, blocks, start, stop)
        running = _add_block(running, logits, targets, head.first_token + start)
    return running


def _column_blocks(head: Head) -> Iterator[tuple[int, int]]:
    size = len(head.weight)
    return ((start, min(start + VOCAB_BLOCK, size)) for start in range(0, size, VOCAB_BLOCK))


def _logits(head: Head, hidden: list[torch.Tensor], start: int, stop: int) -> torch.Tensor:
    """Return float32 logits [n, stop - start]; cap and scale in vLLM's order."""
    logits = _product(hidden, head.weight[start:stop])
    if head.bias is not None:
        logits += head.bias[start:stop].float()
    if head.soft_cap is not None:
        logits = (logits / head.soft_cap).tanh_().mul_(head.soft_cap)
    return logits if head.scale == 1.0 else logits.mul_(head.scale)


def _product(hidden: list[torch.Tensor], weight: torch.Tensor) -> torch.Tensor:
    """Return hidden [n, H] times weight [columns, H]ᵀ in float32, in blocks of `DEPTH_BLOCK`.

    The rounding error of one chain of H additions grows with H. At H = 4096, for logits of 3, its
    rms error is 1.7e-6; with blocks it is 6.9e-7, and 7.9e-7 in MKL, which also uses blocks.
    """
    total, first = _linear(hidden[0], weight), hidden[0].shape[1]
    for block in hidden[1:]:
        total += _linear(block, weight[:, first:])
        first += block.shape[1]
    return total


def _linear(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Return x [n, d] times the first d columns of weight, transposed; on a CPU with oneDNN.

    torch uses MKL for float32 products, which is slower than oneDNN on processors not made by Intel
    (136 against 320 GFLOP/s on an AMD EPYC with AVX-512, 141 against 180 with AVX2 only).
    """
    import torch

    columns = weight[:, : x.shape[1]].float().contiguous()
    if x.device.type == "cpu" and torch._C._has_mkldnn:
        product: torch.Tensor = torch.ops.mkldnn._linear_pointwise(x, columns, None, "none", [], "")
        return product
    return torch.nn.functional.linear(x, columns)


def _add_block(
    running: Reduction, logits: torch.Tensor, targets: torch.Tensor, first_token: int
) -> Reduction:
    """Fold one block of columns into the running log-sum-exp.

    The running maximum keeps every exponent at most 0 (Milakov and Gimelshein, "Online normalizer
    calculation for softmax", arXiv 1805.02867).
    """
    block_max = logits.amax(dim=1)
    maximum = running.maximum.maximum(block_max)
    # On a CPU, finding a maximum's position takes ten times as long as the maximum, and few rows
    # have a new one in a given block. Ties go to the lower token id, as in argmax over the row.
    better = (block_max > running.maximum).nonzero().squeeze(1)
    top1 = running.top1.index_copy(0, better, logits[better].argmax(dim=1) + first_token)
    total = running.total * (running.maximum - maximum).exp()
    column = targets - first_token
    inside = (column >= 0) & (column < logits.shape[1])
    own = logits.gather(1, column.clamp(0, logits.shape[1] - 1))
    # The block's sum of exp(logit - block_max) is one over its largest softmax value. torch's fused
    # softmax takes half the time of subtracting, exponentiating and summing.
    block_total = logits.softmax(dim=1).amax(dim=1).reciprocal()
    total += block_total * (block_max - maximum).exp()
    return Reduction(maximum, total, own.where(inside, running.target), top1)


def _merge_ranks(mine: Reduction, all_gather: Callable[[torch.Tensor], torch.Tensor]) -> Reduction:
    """Combine every rank's maximum, sum, most probable token and targets.

    Each rank sends 3 + k float32 per row instead of its logits; token ids below 2**24 are exact in
    float32.
    """
    import torch

    rows, k = mine.target.shape
    numbers = torch.stack([mine.maximum, mine.total, mine.top1.float()], dim=1)
    ranks = all_gather(torch.cat([numbers, mine.target], dim=1)).view(rows, -1, 3 + k)
    merged = merge_parts(ranks[:, :, 0], ranks[:, :, 1], ranks[:, :, 2])
    return merged._replace(target=ranks[:, :, 3:].amax(dim=1))
