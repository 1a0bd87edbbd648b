"""A scoring request, and how it travels from the caller to the worker."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

# The key in `SamplingParams.extra_args`, the only field that reaches the worker unchanged.
SCORE_KEY = "quantgate_score"
TARGETS = "target_token_ids"
PAD = -1


def is_score_request(sampling_params: Any) -> bool:
    """Whether a vLLM `SamplingParams` (or None, for pooling requests) asks for score mode."""
    extra = getattr(sampling_params, "extra_args", None)
    # Over HTTP a client can put anything there except bytes, which JSON does not have.
    return extra is not None and isinstance(extra.get(SCORE_KEY), bytes)


@dataclass(frozen=True)
class ScoreRequest:
    """The rows of a prompt to score. Row i predicts prompt token i + 1.

    `targets` int32 [rows] or [rows, k], for rows `start`, `start + 1`, …; `PAD` marks unused
    columns. `last_token` is the prompt's last token, which predicts nothing. The engine does not
    get it, so that a prompt of `max_model_len` tokens leaves room for the token that the engine
    always samples. It is None for a prompt of one token, which the engine must get.
    `hidden_states` requests the scored rows' last hidden states, `top1` the most probable token
    beside the targets in each row's dict, `as_list` a plain list of these dicts.
    """

    targets: NDArray[np.int32]
    start: int
    last_token: int | None
    hidden_states: bool = False
    top1: bool = False
    as_list: bool = False

    @property
    def rows(self) -> int:
        """The number of scored rows."""
        return len(self.targets)

    @property
    def columns(self) -> int:
        """The number of targets per row, padding included."""
        return 1 if self.targets.ndim == 1 else self.targets.shape[1]

    def to_wire(self) -> bytes:
        """Return a header and the targets as one value, which is copied and sent unchanged."""
        k = self.targets.shape[1] if self.targets.ndim == 2 else 0
        flags = self.hidden_states | self.top1 << 1 | self.as_list << 2
        last_token = PAD if self.last_token is None else self.last_token
        targets = np.ascontiguousarray(self.targets, "<i4")
        return _HEADER.pack(k, self.start, last_token, flags) + targets.tobytes()

    @classmethod
    def from_params(cls, sampling_params: Any) -> ScoreRequest:
        """Read the request from a `SamplingParams` that carries one."""
        wire = sampling_params.extra_args[SCORE_KEY]
        k, start, last_token, flags = _HEADER.unpack_from(wire)
        targets = np.frombuffer(wire, "<i4", offset=_HEADER.size)
        return cls(
            targets.reshape(-1, k) if k else targets,
            start,
            None if last_token == PAD else last_token,
            hidden_states=bool(flags & 1),
            top1=bool(flags & 2),
            as_list=bool(flags & 4),
        )


# The columns of the targets (0 for targets of one dimension), `start`, `last_token` and flags.
_HEADER = struct.Struct("<4i")


def make_score_request(
    prompt_token_ids: Sequence[int],
    target_token_ids: Any,
    *,
    start: int,
    vocab_size: int,
    **wishes: bool,
) -> ScoreRequest:
    """Check the caller's arguments; a `ValueError` names the parameter and the value.

    Without `target_token_ids`, each row's target is the token that follows it. `wishes` are the
    flags of `ScoreRequest`.
    """
    prompt = _int32(prompt_token_ids)
    if not len(prompt):
        raise ValueError("prompt_token_ids must not be empty with score_mode=True, got [].")
    rows = len(prompt) - 1 - start
    if not 0 <= start <= len(prompt) - 1:
        raise ValueError(
            f"score_start must be in 0 … {len(prompt) - 1} for a prompt of {len(prompt)} tokens, "
            f"got {start}."
        )
    if target_token_ids is None:
        targets = prompt[start + 1 :]
    else:
        targets = _checked_targets(target_token_ids, rows, len(prompt), start, vocab_size)
    last_token = int(prompt[-1]) if len(prompt) > 1 else None
    return ScoreRequest(targets, start, last_token, **wishes)


def _int32(ids: Sequence[int]) -> NDArray[np.int32]:
    """Convert a list of token ids; `struct` is four times as fast as NumPy here."""
    try:
        return np.frombuffer(struct.pack(f"={len(ids)}i", *ids), np.int32)
    except struct.error as error:
        raise ValueError(f"prompt_token_ids must be integers of 32 bits ({error}).") from None


def _checked_targets(
    given: Any, rows: int, prompt_tokens: int, start: int, vocab_size: int
) -> NDArray[np.int32]:
    try:
        targets = np.asarray(given)
    except ValueError:  # nested lists of different lengths
        raise ValueError(
            f"target_token_ids must be [rows] or [rows, k], padded with {PAD}, got a ragged list."
        ) from None
    if rows == 0 and targets.size == 0:
        return np.empty(0, np.int32)
    if targets.dtype.kind not in "iu" or targets.ndim not in (1, 2):
        raise ValueError(
            "target_token_ids must be integers of shape [rows] or [rows, k], got "
            f"{targets.dtype} of shape {list(targets.shape)}."
        )
    if len(targets) != rows:
        raise ValueError(
            f"target_token_ids has {len(targets)} rows, but a prompt of {prompt_tokens} tokens has "
            f"{rows} scored rows from score_start={start} on."
        )
    lowest = PAD if targets.ndim == 2 else 0
    outside = targets[(targets < lowest) | (targets >= vocab_size)]
    if outside.size:
        raise ValueError(
            f"target_token_ids contains {outside.flat[0]}, outside the vocabulary of {vocab_size}."
        )
    return targets.astype(np.int32)
