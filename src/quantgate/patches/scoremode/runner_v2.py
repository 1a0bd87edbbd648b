"""Score mode in vLLM's V2 model runner, the default on GPUs."""

from __future__ import annotations

from typing import Any

from quantgate.patches.scoremode.batch import InProgress, chunk_of, score_step
from quantgate.patches.scoremode.hooks import V2_RUNNER, hook
from quantgate.patches.scoremode.request import ScoreRequest, is_score_request

# The worker's attribute with the scores of prompts still in prefill, by request id.
IN_PROGRESS = "_quantgate_in_progress"


@hook(V2_RUNNER, "PromptLogprobsWorker.add_request")
def add_request(
    stock: Any,
    worker: Any,
    req_id: Any,
    req_idx: Any,
    sampling_params: Any,
    *args: Any,
    **kwargs: Any,
) -> Any:
    """Register a scoring request, and hide it from the runner's own `prompt_logprobs`."""
    answer = stock(req_id, req_idx, sampling_params, *args, **kwargs)
    if is_score_request(sampling_params):
        worker.uses_prompt_logprobs[req_idx] = False
        request = ScoreRequest.from_params(sampling_params)
        worker.__dict__.setdefault(IN_PROGRESS, {})[req_id] = InProgress(request)
    return answer


@hook(V2_RUNNER, "PromptLogprobsWorker.remove_request")
def remove_request(stock: Any, worker: Any, req_id: Any, *args: Any, **kwargs: Any) -> Any:
    """Drop a request that is finished, aborted or preempted; a preempted one is added again."""
    worker.__dict__.get(IN_PROGRESS, {}).pop(req_id, None)
    return stock(req_id, *args, **kwargs)


@hook(V2_RUNNER, "PromptLogprobsWorker.compute_prompt_logprobs")
def compute_prompt_logprobs(  # noqa: PLR0913  the signature is vLLM's
    stock: Any,
    worker: Any,
    logits_fn: Any,
    hidden_states: Any,
    input_batch: Any,
    all_token_ids: Any,
    num_computed_tokens: Any,
    prompt_lens: Any,
    *args: Any,
    **kwargs: Any,
) -> Any:
    """Score scoring requests where the runner computes `prompt_logprobs`."""
    results = stock(
        logits_fn,
        hidden_states,
        input_batch,
        all_token_ids,
        num_computed_tokens,
        prompt_lens,
        *args,
        **kwargs,
    )
    in_progress: dict[str, InProgress] = worker.__dict__.get(IN_PROGRESS, {})
    if not in_progress:
        return results
    chunks = [
        chunk_of(
            req_id,
            in_progress[req_id].request,
            computed=int(input_batch.num_computed_prefill_tokens_np[i]),
            scheduled=int(input_batch.num_scheduled_tokens[i]),
            prompt_tokens=int(prompt_lens[input_batch.idx_mapping_np[i]]),
            batch_row=int(input_batch.query_start_loc_np[i]),
        )
        for i, req_id in enumerate(input_batch.req_ids)
        if req_id in in_progress
    ]
    return results | score_step(logits_fn, hidden_states, chunks, in_progress)
