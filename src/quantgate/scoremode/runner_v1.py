"""Score mode in vLLM's V1 model runner (CPU, and GPUs where vLLM falls back to it)."""

from __future__ import annotations

from types import ModuleType
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from quantgate.scoremode.hooks import replace_method
from quantgate.scoremode.params import is_score_request

if TYPE_CHECKING:
    import torch


class Chunk(NamedTuple):
    """The rows of one request that one engine step computed and that predict prompt tokens.

    `first_row` counts from the request's first token, `batch_row` from the step's first row.
    `last` marks the step that ends the prompt, which is when the scores go back.
    """

    request_id: str
    first_row: int
    batch_row: int
    rows: int
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
            chunks = _chunks(runner, scoring, num_scheduled_tokens)
            results.update(_score_chunks(runner, hidden_states, chunks))
            done = {chunk.request_id for chunk in chunks if chunk.last}
            wanted.update({name: k for name, k in scoring.items() if name not in done})
        return results

    replace_method(module, "GPUModelRunner._get_prompt_logprobs_dict", get_prompt_logprobs)


def _chunks(runner: Any, scoring: dict[str, int], scheduled: dict[str, int]) -> list[Chunk]:
    chunks = []
    for request_id in scoring:
        if request_id not in scheduled:  # preempted while in prefill
            continue
        request = runner.requests[request_id]
        first_row = request.num_computed_tokens
        # The prompt's last row predicts the first generated token: it is not scored.
        rows_left = len(request.prompt_token_ids) - 1 - first_row
        chunks.append(
            Chunk(
                request_id=request_id,
                first_row=first_row,
                batch_row=int(
                    runner.query_start_loc.np[runner.input_batch.req_id_to_index[request_id]]
                ),
                rows=min(scheduled[request_id], rows_left),
                last=scheduled[request_id] > rows_left,
            )
        )
    return chunks


def _score_chunks(runner: Any, hidden_states: torch.Tensor, chunks: list[Chunk]) -> dict[str, Any]:
    """Score every chunk of the step in one call; return the finished requests' tensors."""
    import torch

    from quantgate.scoremode.head import find_head
    from quantgate.scoremode.logprob import score_rows

    targets = np.concatenate([_targets(runner, chunk) for chunk in chunks])
    if len(targets):
        rows = torch.cat([hidden_states[c.batch_row : c.batch_row + c.rows] for c in chunks])
        head, rows = find_head(runner.model, rows)
        scores = score_rows(head, rows, torch.from_numpy(targets).to(rows.device))
        logprob, top1 = scores.logprob.cpu(), scores.top1.cpu()
    offset = 0
    finished = {}
    for chunk in chunks:
        buffers = _buffers(runner, chunk.request_id)
        if chunk.rows:
            own = slice(offset, offset + chunk.rows)
            into = slice(chunk.first_row, chunk.first_row + chunk.rows)
            buffers.logprob_token_ids[into, 0] = torch.from_numpy(targets[own])
            buffers.logprobs[into, 0] = logprob[own]
            buffers.selected_token_ranks[into] = top1[own]
            offset += chunk.rows
        if chunk.last:
            runner.requests[chunk.request_id].in_progress_prompt_logprobs_cpu = None
            finished[chunk.request_id] = buffers
    return finished


def _targets(runner: Any, chunk: Chunk) -> np.ndarray[Any, np.dtype[np.int64]]:
    """Row i predicts prompt token i + 1."""
    tokens = runner.input_batch.token_ids_cpu[runner.input_batch.req_id_to_index[chunk.request_id]]
    first = chunk.first_row + 1
    return np.asarray(tokens[first : first + chunk.rows], dtype=np.int64)


def _buffers(runner: Any, request_id: str) -> Any:
    """Return the request's `LogprobsTensors`, which chunks of a long prompt fill in turn.

    vLLM's own container, so that scheduler and serialization carry it unchanged: token ids [n, 1]
    and log-probabilities [n, 1] as vLLM means them; `selected_token_ranks` [n] holds the most
    probable token instead of a rank, which would cost a pass over the vocabulary.
    """
    from vllm.v1.outputs import LogprobsTensors

    request = runner.requests[request_id]
    if request.in_progress_prompt_logprobs_cpu is None:
        rows = len(request.prompt_token_ids) - 1
        request.in_progress_prompt_logprobs_cpu = LogprobsTensors.empty_cpu(rows, 1)
    return request.in_progress_prompt_logprobs_cpu
