"""One engine step of score mode, on either model runner."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import starmap
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from quantgate.patches.scoremode.request import PAD, ScoreRequest

if TYPE_CHECKING:
    import torch


class Part(NamedTuple):
    """The results of one step for n rows of one request, on the worker's device.

    `top1` int32 [n]; `values` float32 [n, 1 + k (+ H)]: the most probable token's log-probability,
    the targets', and the hidden states if requested.
    """

    top1: torch.Tensor
    values: torch.Tensor


@dataclass
class InProgress:
    """A request's scores so far; a long prompt is scored chunk by chunk."""

    request: ScoreRequest
    parts: list[Part] = field(default_factory=list)


@dataclass(frozen=True)
class Chunk:
    """The scored rows of one request that one engine step computed.

    `first` counts from the request's first scored row, `batch_row` from the step's first row.
    `last` marks the step that ends the prompt, after which the scores are returned.
    """

    request_id: str
    first: int
    rows: int
    batch_row: int
    last: bool


def chunk_of(
    request_id: str,
    request: ScoreRequest,
    *,
    computed: int,
    scheduled: int,
    prompt_tokens: int,
    batch_row: int,
) -> Chunk:
    """Return the rows to score in a step of `scheduled` tokens, after `computed` earlier ones.

    `batch_row` is the first row of this request's hidden states in the step.
    """
    skipped = max(0, request.start - computed)  # rows before the first scored one
    first = computed + skipped - request.start
    rows = max(0, min(scheduled - skipped, request.rows - first))
    last = computed + scheduled >= prompt_tokens
    return Chunk(request_id, first, rows, batch_row + skipped, last)


def score_step(
    compute_logits: Callable[[torch.Tensor], Any],
    hidden_states: torch.Tensor,
    chunks: list[Chunk],
    in_progress: dict[str, InProgress],
) -> dict[str, Any]:
    """Score all rows of a step in one call; return the `LogprobsTensors` of finished requests.

    `compute_logits` is the model's bound method, `hidden_states` [tokens, H] the step's. Finished
    requests are removed from `in_progress`. If the model's head cannot be scored exactly, or some
    rows of a prompt were not computed here, the requests' results carry the reason instead: an
    exception here would end the engine.
    """
    from quantgate.patches.scoremode.head import HeadRefused

    # Sorted by row, they often form one range of the step, which need not be copied.
    scored = sorted((chunk for chunk in chunks if chunk.rows), key=lambda chunk: chunk.batch_row)
    finished = [chunk.request_id for chunk in chunks if chunk.last]
    try:
        if scored:
            _score_chunks(compute_logits, hidden_states, scored, in_progress)
    except HeadRefused as refusal:
        for name in finished:
            del in_progress[name]
        return dict.fromkeys(finished, _refused(str(refusal)))
    return _answers({name: in_progress.pop(name) for name in finished}, hidden_states.shape[1])


def _score_chunks(
    compute_logits: Callable[[torch.Tensor], Any],
    hidden_states: torch.Tensor,
    chunks: list[Chunk],
    in_progress: dict[str, InProgress],
) -> None:
    import torch

    from quantgate.patches.scoremode.head import find_head
    from quantgate.patches.scoremode.logprob import score_rows

    hidden = _rows(hidden_states, chunks)
    head, rows = find_head(compute_logits, hidden)
    targets = _padded([_targets(in_progress[c.request_id].request, c) for c in chunks])
    scores = score_rows(head, rows, _uploaded(targets, rows.device))
    top1 = scores.top1.int()
    values = torch.cat([scores.top1_logprob.unsqueeze(1), scores.logprob], dim=1)
    offset = 0
    for chunk in chunks:
        mine, own = in_progress[chunk.request_id], slice(offset, offset + chunk.rows)
        if chunk.first == 0:  # first time, or restarted after a preemption
            mine.parts.clear()
        part = values[own, : 1 + mine.request.columns]
        if mine.request.hidden_states:
            part = torch.cat([part, hidden[own].float()], dim=1)
        mine.parts.append(Part(top1[own], part))
        offset += chunk.rows


def _uploaded(targets: np.ndarray[Any, Any], device: torch.device) -> torch.Tensor:
    """Copy targets to the device, from pinned memory so that the host does not wait."""
    import torch

    on_host = torch.from_numpy(targets)
    if device.type != "cuda":
        return on_host.to(device)
    return on_host.pin_memory().to(device, non_blocking=True)


def _rows(hidden_states: torch.Tensor, chunks: list[Chunk]) -> torch.Tensor:
    """Return the chunks' rows, without a copy if each chunk begins where the previous one ends."""
    import torch

    ranges: list[list[int]] = []
    for chunk in chunks:
        end = chunk.batch_row + chunk.rows
        if ranges and ranges[-1][1] == chunk.batch_row:
            ranges[-1][1] = end
        else:
            ranges.append([chunk.batch_row, end])
    parts = [hidden_states[start:end] for start, end in ranges]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _targets(request: ScoreRequest, chunk: Chunk) -> np.ndarray[Any, np.dtype[np.int32]]:
    return request.targets[chunk.first : chunk.first + chunk.rows].reshape(chunk.rows, -1)


def _padded(blocks: list[np.ndarray[Any, Any]]) -> np.ndarray[Any, np.dtype[np.int64]]:
    """Stack [rows, k] blocks of different k, padded with `PAD`, which matches no token."""
    width = max(block.shape[1] for block in blocks)
    if all(block.shape[1] == width for block in blocks):
        return np.concatenate(blocks, dtype=np.int64)
    padded = np.full((sum(map(len, blocks)), width), PAD, np.int64)
    row = 0
    for block in blocks:
        padded[row : row + len(block), : block.shape[1]] = block
        row += len(block)
    return padded


def _answers(finished: dict[str, InProgress], hidden_size: int) -> dict[str, Any]:
    """Return each request's scores on the host, or the sentence that refuses it.

    Requests with equally wide values share one asynchronous transfer. Three transfers per request
    would take longer than scoring it.
    """
    import torch
    from vllm.v1.outputs import LogprobsTensors

    answers: dict[str, Any] = {}
    by_width: dict[int, list[str]] = {}
    for name, one in finished.items():
        if (rows := sum(len(part.top1) for part in one.parts)) != one.request.rows:
            answers[name] = _refused(
                f"score mode got {rows} of the {one.request.rows} rows to score: vLLM took the "
                "others from a cache beyond score_start, as a KV connector does; score from row 0.",
            )
        elif one.parts:
            by_width.setdefault(one.parts[0].values.shape[1], []).append(name)
        else:  # no row to score: a prompt of one token, or score_start at its last row
            answers[name] = _no_scores(one.request, hidden_size)
    for names in by_width.values():
        parts = [part for name in names for part in finished[name].parts]
        rows_of = [finished[name].request.rows for name in names]
        top1 = _on_host([part.top1 for part in parts])
        values = _on_host([part.values for part in parts])
        tensors = zip(*(torch.split(x, rows_of) for x in _columns(top1, values)), strict=True)
        answers |= zip(names, starmap(LogprobsTensors, tensors), strict=True)
    return answers


def _on_host(parts: list[torch.Tensor]) -> torch.Tensor:
    import torch

    whole = parts[0] if len(parts) == 1 else torch.cat(parts)
    return whole.to("cpu", non_blocking=True)


def _no_scores(request: ScoreRequest, hidden_size: int) -> Any:
    import torch
    from vllm.v1.outputs import LogprobsTensors

    width = 1 + request.columns + (hidden_size if request.hidden_states else 0)
    return LogprobsTensors(*_columns(torch.empty(0, dtype=torch.int32), torch.empty(0, width)))


def _columns(top1: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Return the fields of vLLM's container, which scheduler and sockets pass on unchanged.

    `logprob_token_ids` [rows, 1] are the most probable tokens, `logprobs` the values of `Part`. The
    third field would be the ranks, which are not used and would cost a pass over the vocabulary; it
    repeats the tokens.
    """
    return top1.unsqueeze(1), values, top1


def _refused(reason: str) -> Any:
    """Pack a refusal in place of scores: its code points as token ids, and no values."""
    import torch
    from vllm.v1.outputs import LogprobsTensors

    codes = torch.tensor([ord(character) for character in reason], dtype=torch.int32)
    return LogprobsTensors(
        codes.unsqueeze(1), torch.empty(len(codes), 0), codes.new_zeros(len(codes))
    )
