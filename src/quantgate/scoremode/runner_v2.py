"""Score mode in vLLM's V2 model runner, the default on GPUs."""

from __future__ import annotations

from types import ModuleType
from typing import Any

from quantgate.scoremode.batch import InProgress, chunk_of, score_step
from quantgate.scoremode.hooks import replace_method
from quantgate.scoremode.request import ScoreRequest, is_score_request

# Where a worker keeps the scores of prompts that are still being prefilled, by request id.
IN_PROGRESS = "_quantgate_in_progress"


def patch_prompt_logprobs_worker(module: ModuleType) -> None:
    """Answer scoring requests where the runner answers `prompt_logprobs`."""

    def add_request(
        stock: Any, worker: Any, req_id: str, req_idx: int, sampling_params: Any
    ) -> None:
        stock(req_id, req_idx, sampling_params)
        if is_score_request(sampling_params):
            worker.uses_prompt_logprobs[req_idx] = False  # ours, not stock's
            request = ScoreRequest.from_params(sampling_params)
            worker.__dict__.setdefault(IN_PROGRESS, {})[req_id] = InProgress(request)

    def remove_request(stock: Any, worker: Any, req_id: str) -> None:
        """Forget a request that is finished, aborted, or preempted and to be added again."""
        stock(req_id)
        worker.__dict__.get(IN_PROGRESS, {}).pop(req_id, None)

    def compute_prompt_logprobs(
        stock: Any,
        worker: Any,
        logits_fn: Any,
        hidden_states: Any,
        input_batch: Any,
        all_token_ids: Any,
        num_computed_tokens: Any,
        prompt_lens: Any,
    ) -> dict[str, Any]:
        results: dict[str, Any] = stock(
            logits_fn, hidden_states, input_batch, all_token_ids, num_computed_tokens, prompt_lens
        )
        in_progress: dict[str, InProgress] = worker.__dict__.get(IN_PROGRESS, {})
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

    replace_method(module, "PromptLogprobsWorker.add_request", add_request)
    replace_method(module, "PromptLogprobsWorker.remove_request", remove_request)
    replace_method(module, "PromptLogprobsWorker.compute_prompt_logprobs", compute_prompt_logprobs)
