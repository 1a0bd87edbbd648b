"""Exact divergence of next-token distributions.

KL divergence over the whole vocabulary needs the logits of both sides, but they need not be stored:
they are recomputed from a hidden state and its head. Rows are processed in chunks to bound memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from quantgate.measuring.reference_device import CPU, exactly

if TYPE_CHECKING:
    import torch

# float32 logits of one side held at once: 261 rows at a vocabulary of 128k, enough to make the
# product bound by arithmetic rather than by reading the head.
CHUNK_BYTES = 128 << 20
# How much is summed at a time: small enough that it and its few copies stay in a CPU's cache.
BLOCK_BYTES = 1 << 20
# A GPU has a larger cache, and every further block makes it wait.
BLOCK_BYTES_OF_A_GPU = CHUNK_BYTES
# Below this |Δ log-prob| a term of the sum is computed with `expm1`, which avoids cancellation.
SMALL = 1.0

Logits = Callable[["torch.Tensor"], "torch.Tensor"]


@dataclass(frozen=True)
class Side:
    """Hidden states and a head that yield n next-token distributions."""

    hidden: NDArray[np.float32]
    """The head's input [n, H]."""
    logits: Logits
    """The head: [rows, H] to float32 logits [rows, V]."""
    vocabulary: int
    """V."""


@dataclass(frozen=True)
class Divergence:
    """n distributions compared with a base's; logarithms are natural."""

    kld: NDArray[np.float64]
    """KL(base || other) of each token [n], nat: never negative, 0 where both are equal."""
    logprob: NDArray[np.float64]
    """Log-probability of the text's own tokens [n]."""
    logprob_base: NDArray[np.float64]
    same_top: NDArray[np.bool_]
    """Whether the most probable token is the same [n]."""
    confidence: NDArray[np.float64]
    """The base's largest probability [n]."""
    extra: int = 0
    """How many more tokens `other` has than the base, e.g. in a padded vocabulary; negative where
    the base has more."""

    @property
    def delta_p(self) -> NDArray[np.float64]:
        """Δp: the probability of the text's own token minus the base's [n]."""
        found: NDArray[np.float64] = np.exp(self.logprob) - np.exp(self.logprob_base)
        return found


def divergence(
    base: Side, other: Side, targets: NDArray[np.int64], device: str = CPU
) -> Divergence:
    """Return the divergence of `other` from `base`; `targets` [n] are the text's own tokens.

    Both sides' heads are on `device`, where the sums are computed too. A longer vocabulary must
    begin with the shorter one. The base's distribution covers the common tokens and is zero
    elsewhere, so probability that `other` gives to further tokens counts as divergence.
    """
    import torch

    if not len(base.hidden) == len(other.hidden) == len(targets) > 0:
        raise ValueError(
            f"{len(base.hidden)}, {len(other.hidden)} hidden states and {len(targets)} targets."
        )
    common = min(base.vocabulary, other.vocabulary)
    if targets.max() >= common:
        raise ValueError(
            f"token {targets.max()} of the text is in one vocabulary only: they have "
            f"{base.vocabulary} and {other.vocabulary} tokens."
        )
    rows = max(1, CHUNK_BYTES // (4 * max(base.vocabulary, other.vocabulary)))
    parts: list[tuple[torch.Tensor, ...]] = []
    with exactly(torch.device(device)):
        for start in range(0, len(targets), rows):
            chunk = slice(start, start + rows)
            ours, theirs = (
                s.logits(torch.from_numpy(s.hidden[chunk]).to(device)) for s in (base, other)
            )
            ours = _widened(ours[:, :common], other.vocabulary)
            parts += _in_blocks(ours, theirs, torch.from_numpy(targets[chunk]).to(device))
        kld, own, own_of_base, same, confidence = (
            torch.cat(column).cpu().numpy() for column in zip(*parts, strict=True)
        )
    return Divergence(
        kld.astype(np.float64),
        own.astype(np.float64),
        own_of_base.astype(np.float64),
        same,
        confidence.astype(np.float64),
        other.vocabulary - base.vocabulary,
    )


def _widened(logits: torch.Tensor, vocabulary: int) -> torch.Tensor:
    """Return logits [rows, V] padded with tokens of probability zero."""
    import torch

    more = vocabulary - logits.shape[1]
    return torch.nn.functional.pad(logits, (0, more), value=-torch.inf) if more else logits


def _in_blocks(
    base: torch.Tensor, other: torch.Tensor, targets: torch.Tensor
) -> Iterator[tuple[torch.Tensor, ...]]:
    """Yield the columns of `Divergence` for logits [rows, V], a few rows at a time."""
    most = BLOCK_BYTES if base.device.type == CPU else BLOCK_BYTES_OF_A_GPU
    rows = max(1, most // (4 * base.shape[-1]))
    for start in range(0, len(targets), rows):
        block = slice(start, start + rows)
        yield _columns(base[block], other[block], targets[block])


def _columns(
    base: torch.Tensor, other: torch.Tensor, targets: torch.Tensor
) -> tuple[torch.Tensor, ...]:
    log_p, log_q = (logits.float().log_softmax(dim=-1) for logits in (base, other))
    own = targets[:, None]
    confidence, top = log_p.max(dim=-1)
    return (
        kl_divergence(log_p, log_q),
        log_q.gather(1, own)[:, 0],
        log_p.gather(1, own)[:, 0],
        log_q.argmax(dim=-1) == top,
        confidence.exp(),
    )


def kl_divergence(log_p: torch.Tensor, log_q: torch.Tensor) -> torch.Tensor:
    """Return KL(p || q) [rows] of log-probabilities [rows, V], never negative.

    Computed as the sum of p·ln(p/q) - p + q, a Bregman divergence: every term is at least 0, and 0
    where p = q, so rounding of large terms cannot make a small sum negative.
    """
    import torch

    delta = log_p - log_q
    p, q = log_p.exp(), log_q.exp()
    small = p * (delta + torch.expm1(-delta))
    # Where p is 0 in float32, p·Δ is 0 too, unless Δ is infinite.
    large = torch.where(p > 0, p * delta, 0.0) - p + q
    return torch.where(delta.abs() < SMALL, small, large).clamp_min(0).sum(dim=-1)


# llama.cpp's statistics (tools/perplexity/perplexity.cpp, kl_divergence), under its names ---------
