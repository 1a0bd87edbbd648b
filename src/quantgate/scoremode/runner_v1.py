"""Score mode in vLLM's V1 model runner (CPU, and GPUs where vLLM falls back to it)."""

from __future__ import annotations

from dataclasses import dataclass
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np

from quantgate.scoremode.hooks import replace_method
from quantgate.scoremode.request import ScoreRequest, is_score_request

if TYPE_CHECKING:
    import torch

# Where a runner keeps the scores of prompts that are still being prefilled, by request id.
IN_PROGRESS = "_quantgate_in_progress"


@dataclass
class InProgress:
    """A request's scores so far: chunks of a long prompt fill them in turn."""

    request: ScoreRequest
    logprobs: torch.Tensor
    """float32 [rows, k], followed by [rows, H] hidden states where they were asked for."""
    top1: torch.Tensor
    """int32 [rows]."""


@dataclass(frozen=True)
class Chunk:
    """The scored rows of one request that one engine step computed.

    `first` counts from the request's first scored row, `batch_row` from the step's first row.
    `last` marks the step that ends the prompt, which is when the scores go back.
    """

    request_id: str
    first: int
    rows: int
    batch_row: int
    last: bool


def patch_model_runner(module: ModuleType) -> None:
    """Answer scoring requests where the runner answers `prompt_logprobs`."""

    def get_prompt_logprobs(
        stock: Any, runner: Any, hidden_states: Any, num_scheduled_tokens: dict[str, int]
    ) -> dict[str, Any]:
        wanted = runner.num_prompt_logprobs
        scoring = {
            request_id: wanted.pop(request_id)
            for request_id in list(wanted)
            if is_score_request(runner.requests[request_id].sampling_params)
        }
        results: dict[str, Any] = stock(hidden_states, num_scheduled_tokens)
        if scoring:
            results |= _score_step(runner, hidden_states, scoring, num_scheduled_tokens)
            wanted.update({name: k for name, k in scoring.items() if name not in results})
        return results

    replace_method(module, "GPUModelRunner._get_prompt_logprobs_dict", get_prompt_logprobs)


def _score_step(
    runner: Any, hidden_states: torch.Tensor, scoring: dict[str, int], scheduled: dict[str, int]
) -> dict[str, Any]:
    """Score all rows of this step in one call; return the finished requests' tensors."""
    in_progress = runner.__dict__.setdefault(IN_PROGRESS, {})
    for aborted in in_progress.keys() - scoring.keys():
        del in_progress[aborted]
    for request_id in scoring:
        if request_id not in in_progress:
            in_progress[request_id] = _begin(runner, request_id, hidden_states.shape[1])
    # A request that is not scheduled was preempted while in prefill.
    chunks = [
        _chunk(runner, name, in_progress[name].request, scheduled[name])
        for name in scoring
        if name in scheduled
    ]
    _score_chunks(runner, hidden_states, [chunk for chunk in chunks if chunk.rows], in_progress)
    finished = [chunk.request_id for chunk in chunks if chunk.last]
    return {request_id: _tensors(in_progress.pop(request_id)) for request_id in finished}


def _begin(runner: Any, request_id: str, hidden_size: int) -> InProgress:
    import torch

    request = ScoreRequest.from_params(runner.requests[request_id].sampling_params)
    columns = 1 if request.targets.ndim == 1 else request.targets.shape[1]
    columns += hidden_size if request.hidden_states else 0
    return InProgress(
        request,
        logprobs=torch.full((request.rows, columns), torch.nan, dtype=torch.float32),
        top1=torch.zeros(request.rows, dtype=torch.int32),
    )


def _chunk(runner: Any, request_id: str, request: ScoreRequest, scheduled: int) -> Chunk:
    state, batch = runner.requests[request_id], runner.input_batch
    first_row = state.num_computed_tokens
    skipped = max(0, request.start - first_row)  # rows before the first scored one
    first = first_row + skipped - request.start
    rows = max(0, min(scheduled - skipped, request.rows - first))
    start = int(runner.query_start_loc.np[batch.req_id_to_index[request_id]])
    last = first_row + scheduled >= len(state.prompt_token_ids)
    return Chunk(request_id, first, rows, start + skipped, last)


def _score_chunks(
    runner: Any,
    hidden_states: torch.Tensor,
    chunks: list[Chunk],
    in_progress: dict[str, InProgress],
) -> None:
    import torch

    from quantgate.scoremode.head import find_head
    from quantgate.scoremode.logprob import score_rows

    if not chunks:
        return
    targets = _padded([_targets(in_progress[c.request_id], c) for c in chunks])
    hidden = _rows(hidden_states, chunks)
    head, rows = find_head(runner.model, hidden)
    scores = score_rows(head, rows, torch.from_numpy(targets).to(rows.device))
    logprob, top1 = scores.logprob.cpu(), scores.top1.cpu()
    offset = 0
    for chunk in chunks:
        mine, own = in_progress[chunk.request_id], slice(offset, offset + chunk.rows)
        into = slice(chunk.first, chunk.first + chunk.rows)
        k = 1 if mine.request.targets.ndim == 1 else mine.request.targets.shape[1]
        mine.logprobs[into, :k] = logprob[own, :k]
        mine.top1[into] = top1[own]
        if mine.request.hidden_states:
            mine.logprobs[into, k:] = hidden[own].float().cpu()
        offset += chunk.rows


def _rows(hidden_states: torch.Tensor, chunks: list[Chunk]) -> torch.Tensor:
    """Return the chunks' rows; without a copy where they are one range, as with one request."""
    import torch

    if len(chunks) == 1:
        return hidden_states[chunks[0].batch_row : chunks[0].batch_row + chunks[0].rows]
    return torch.cat([hidden_states[c.batch_row : c.batch_row + c.rows] for c in chunks])


def _targets(mine: InProgress, chunk: Chunk) -> np.ndarray[Any, np.dtype[np.int64]]:
    targets = mine.request.targets[chunk.first : chunk.first + chunk.rows]
    return targets.astype(np.int64).reshape(chunk.rows, -1)


def _padded(blocks: list[np.ndarray[Any, Any]]) -> np.ndarray[Any, np.dtype[np.int64]]:
    """Stack [rows, k] blocks of different k, padded with -1, which matches no token."""
    width = max(block.shape[1] for block in blocks)
    return np.concatenate(
        [np.pad(b, ((0, 0), (0, width - b.shape[1])), constant_values=-1) for b in blocks]
    )


def _tensors(finished: InProgress) -> Any:
    """Pack a request's scores into vLLM's container, which scheduler and sockets carry as it is.

    `logprob_token_ids` [rows, 1] holds the most probable tokens; there are no ranks, which would
    cost a pass over the vocabulary.
    """
    from vllm.v1.outputs import LogprobsTensors

    top1 = finished.top1
    return LogprobsTensors(top1.unsqueeze(1), finished.logprobs, top1.new_zeros(len(top1)))
