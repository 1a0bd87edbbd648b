"""Score mode in vLLM's V1 model runner (CPU, and GPUs where vLLM falls back to it)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from quantgate.patches.scoremode.batch import Chunk, InProgress, chunk_of, score_step
from quantgate.patches.scoremode.hooks import V1_RUNNER, hook
from quantgate.patches.scoremode.request import ScoreRequest, is_score_request

if TYPE_CHECKING:
    import torch

# The runner's attribute with the scores of prompts still in prefill, by request id.
IN_PROGRESS = "_quantgate_in_progress"


@hook(V1_RUNNER, "GPUModelRunner._get_prompt_logprobs_dict")
def get_prompt_logprobs(
    stock: Any,
    runner: Any,
    hidden_states: Any,
    num_scheduled_tokens: Any,
    *args: Any,
    **kwargs: Any,
) -> Any:
    """Score scoring requests where the runner computes `prompt_logprobs`."""
    wanted = getattr(runner, "num_prompt_logprobs", {})
    scoring = {
        request_id: wanted.pop(request_id)
        for request_id in list(wanted)
        if is_score_request(runner.requests[request_id].sampling_params)
    }
    results = stock(hidden_states, num_scheduled_tokens, *args, **kwargs)
    if scoring:
        scores = _score(runner, hidden_states, list(scoring), num_scheduled_tokens)
        runner._sync_device()
        results |= scores
        wanted.update({name: k for name, k in scoring.items() if name not in results})
    return results


def _score(
    runner: Any, hidden_states: torch.Tensor, scoring: list[str], scheduled: dict[str, int]
) -> dict[str, Any]:
    in_progress = runner.__dict__.setdefault(IN_PROGRESS, {})
    for aborted in in_progress.keys() - set(scoring):
        del in_progress[aborted]
    for request_id in scoring:
        if request_id not in in_progress:
            params = runner.requests[request_id].sampling_params
            in_progress[request_id] = InProgress(ScoreRequest.from_params(params))
    # A request that is not scheduled was preempted during prefill.
    chunks = [
        _chunk(runner, name, in_progress[name].request, scheduled[name])
        for name in scoring
        if name in scheduled
    ]
    return score_step(runner.model.compute_logits, hidden_states, chunks, in_progress)


def _chunk(runner: Any, request_id: str, request: ScoreRequest, scheduled: int) -> Chunk:
    state, batch = runner.requests[request_id], runner.input_batch
    return chunk_of(
        request_id,
        request,
        computed=state.num_computed_tokens,
        scheduled=scheduled,
        prompt_tokens=len(state.prompt_token_ids),
        batch_row=int(runner.query_start_loc.np[batch.req_id_to_index[request_id]]),
    )
