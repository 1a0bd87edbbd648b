"""The scoring core's data: a head, a partial log-sum-exp, and scores."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    import torch


class Scores(NamedTuple):
    """The scores of n rows; log-probabilities are natural, in float32.

    `logprob` [n, k] of the targets; `top1` int64 [n], the most probable token; `top1_logprob` [n].
    """

    logprob: torch.Tensor
    top1: torch.Tensor
    top1_logprob: torch.Tensor


@dataclass(frozen=True)
class Head:
    """A language-model head, or one tensor-parallel rank's shard of it.

    `weight` [size, H] in any floating dtype and `bias` [size] give `size` logits per row, the
    first for token `first_token`; the soft cap and the scale apply afterwards. Under tensor
    parallelism, `all_gather` turns this rank's [n, w] into every rank's [n, ranks * w].
    """

    weight: torch.Tensor
    bias: torch.Tensor | None = None
    first_token: int = 0
    soft_cap: float | None = None
    scale: float = 1.0
    all_gather: Callable[[torch.Tensor], torch.Tensor] | None = None


class Reduction(NamedTuple):
    """A partial log-sum-exp over some columns of n rows, in float32.

    `maximum` [n] of the logits, `total` [n] of exp(logit - maximum), `target` [n, k] the targets'
    own logits (-inf where another column holds them), `top1` int64 [n].
    """

    maximum: torch.Tensor
    total: torch.Tensor
    target: torch.Tensor
    top1: torch.Tensor


def merge_parts(maximum: torch.Tensor, total: torch.Tensor, top1: torch.Tensor) -> Reduction:
    """Combine partial reductions [n, parts] over disjoint columns, in ascending order of column.

    The returned `target` is empty; the caller combines the parts' targets.
    """
    whole, winner = maximum.max(dim=1)
    scaled = total * (maximum - whole.unsqueeze(1)).exp()
    best = top1.gather(1, winner.unsqueeze(1)).squeeze(1)
    return Reduction(whole, scaled.sum(dim=1), maximum.new_empty(len(whole), 0), best.long())


def scores_of(whole: Reduction) -> Scores:
    """Return the scores of a reduction over the whole vocabulary."""
    log_total = whole.total.log()
    # Subtract the maximum first: it may be large, and would round off the small number.
    logprob = (whole.target - whole.maximum.unsqueeze(1)) - log_total.unsqueeze(1)
    return Scores(logprob, whole.top1, -log_total)
