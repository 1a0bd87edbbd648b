"""The scoring core: exact log-probabilities from hidden rows and a language-model head.

*Exact* means the log-softmax, in float32, of the logits that the head gives for a hidden row, with
the product accumulated in float32 and never rounded to the serving dtype. `[rows, vocab]` is never
held: the vocabulary goes by in blocks that stay in cache, with a running maximum and sum.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    import torch

# 1024 rows × 512 columns of float32 are 2 MiB: one block of logits stays in a core's cache, and a
# block of the head, converted to float32 once, serves all of those rows.
ROW_BLOCK = 1024
VOCAB_BLOCK = 512


class Scores(NamedTuple):
    """What scoring returns for n rows.

    `logprob`: float32 [n, k], natural log. `top1`: int64 [n], the most probable token.
    """

    logprob: torch.Tensor
    top1: torch.Tensor


@dataclass(frozen=True)
class Head:
    """A language-model head, or one tensor-parallel rank's shard of it.

    `logits` maps hidden rows [n, H] and a column range to float32 logits [n, columns] before
    soft-capping and scaling. `size` columns, the first of which is token `first_token`. With
    `all_gather` (tensor parallelism), a function that turns this rank's [n, w] into every rank's
    [n, ranks * w].
    """

    logits: Callable[[torch.Tensor, int, int], torch.Tensor]
    size: int
    first_token: int = 0
    soft_cap: float | None = None
    scale: float = 1.0
    all_gather: Callable[[torch.Tensor], torch.Tensor] | None = None


class _Running(NamedTuple):
    """Log-sum-exp in progress: [n], and [n, k] for the targets' logits, -inf until their block."""

    maximum: torch.Tensor
    total: torch.Tensor
    target: torch.Tensor
    top1: torch.Tensor


def weight_head(weight: torch.Tensor, bias: torch.Tensor | None = None, **settings: object) -> Head:
    """Return a head over a plain weight [vocab, H] in any floating dtype."""
    import torch

    def logits(hidden: torch.Tensor, start: int, stop: int) -> torch.Tensor:
        block_bias = None if bias is None else bias[start:stop].float()
        return torch.nn.functional.linear(hidden, weight[start:stop].float(), block_bias)

    return Head(logits=logits, size=weight.shape[0], **settings)  # type: ignore[arg-type]


def score_rows(head: Head, hidden: torch.Tensor, targets: torch.Tensor) -> Scores:
    """Score `targets` (int64 [n, k]) as predictions from `hidden` [n, H], any floating dtype.

    A target outside the vocabulary, such as the padding -1, scores -inf.
    """
    import torch

    logprob = torch.empty(targets.shape, dtype=torch.float32, device=hidden.device)
    top1 = torch.empty(len(targets), dtype=torch.int64, device=hidden.device)
    for start in range(0, len(targets), ROW_BLOCK):
        rows = slice(start, start + ROW_BLOCK)
        running = _score_block(head, hidden[rows].float(), targets[rows])
        if head.all_gather is not None:
            running = _merge_ranks(running, head.all_gather)
        logprob[rows] = running.target - (running.maximum + running.total.log()).unsqueeze(1)
        top1[rows] = running.top1
    return Scores(logprob, top1)


def _score_block(head: Head, hidden: torch.Tensor, targets: torch.Tensor) -> _Running:
    import torch

    running = _Running(
        maximum=hidden.new_full((len(targets),), -torch.inf),
        total=hidden.new_zeros(len(targets)),
        target=hidden.new_full(targets.shape, -torch.inf),
        top1=torch.zeros_like(targets[:, 0]),
    )
    for start, stop in _blocks(head.size):
        logits = _shape_logits(head, head.logits(hidden, start, stop))
        running = _add_block(running, logits, targets, head.first_token + start)
    return running


def _blocks(size: int) -> Iterator[tuple[int, int]]:
    return ((start, min(start + VOCAB_BLOCK, size)) for start in range(0, size, VOCAB_BLOCK))


def _shape_logits(head: Head, logits: torch.Tensor) -> torch.Tensor:
    """Apply the soft cap and the scale in vLLM's order (`LogitsProcessor.forward`)."""
    if head.soft_cap is not None:
        logits = (logits / head.soft_cap).tanh_().mul_(head.soft_cap)
    return logits if head.scale == 1.0 else logits.mul_(head.scale)


def _add_block(
    running: _Running, logits: torch.Tensor, targets: torch.Tensor, first_token: int
) -> _Running:
    """Fold one block of columns into the running log-sum-exp.

    The running maximum keeps every exponent at most 0 (Milakov and Gimelshein, "Online normalizer
    calculation for softmax", arXiv 1805.02867).
    """
    block_max = logits.amax(dim=1)
    maximum = running.maximum.maximum(block_max)
    # Finding the position of a maximum costs ten times the maximum on a CPU, and few rows have a
    # new one in a given block. A tie goes to the lower token id, as in argmax over the whole row.
    better = (block_max > running.maximum).nonzero().squeeze(1)
    top1 = running.top1.index_copy(0, better, logits[better].argmax(dim=1) + first_token)
    total = running.total * (running.maximum - maximum).exp()
    column = targets - first_token
    inside = (column >= 0) & (column < logits.shape[1])
    own = logits.gather(1, column.clamp(0, logits.shape[1] - 1))
    # Overwrites the block, which nobody reads again.
    total += logits.sub_(maximum.unsqueeze(1)).exp_().sum(dim=1)
    return _Running(
        maximum=maximum,
        total=total,
        target=own.where(inside, running.target),
        top1=top1,
    )


def _merge_ranks(running: _Running, all_gather: Callable[[torch.Tensor], torch.Tensor]) -> _Running:
    """Combine every rank's maximum, sum, most probable token and targets.

    3 + k float32 a row and rank cross the wire instead of the rank's logits; token ids below 2**24
    are exact in float32.
    """
    import torch

    rows, k = running.target.shape
    numbers = [running.maximum, running.total, running.top1.float()]
    mine = torch.cat([torch.stack(numbers, dim=1), running.target], dim=1)
    ranks = all_gather(mine).view(rows, -1, 3 + k)
    maximum, winner = ranks[:, :, 0].max(dim=1)
    total = (ranks[:, :, 1] * (ranks[:, :, 0] - maximum.unsqueeze(1)).exp()).sum(dim=1)
    top1 = ranks[:, :, 2].gather(1, winner.unsqueeze(1)).squeeze(1).long()
    return _Running(maximum, total, ranks[:, :, 3:].amax(dim=1), top1)
