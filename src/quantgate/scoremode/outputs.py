"""The caller's side of score mode: arrays instead of one Python object per token."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from types import ModuleType
from typing import Any, overload

import numpy as np
from numpy.typing import NDArray

from quantgate.scoremode.hooks import replace_method
from quantgate.scoremode.request import PAD, ScoreRequest, is_score_request

Row = dict[int, Any]


class PromptScores(Sequence[Row | None]):
    """`RequestOutput.prompt_logprobs` of a scoring request.

    Reads like vLLM's own list (`None` where nothing was scored, then `{token_id: Logprob}` a
    token), built row by row as it is read. Code that scores text should take the arrays instead,
    one row for each scored prompt token, from token `start + 1` on:

    `token_ids`      int32 [rows], or [rows, k] where k targets a row were given
    `logprobs`       float32, of the same shape, in nats; -inf in padded columns
    `top1`           int32 [rows], the most probable token
    `hidden_states`  float32 [rows, H], the last hidden states, or None
    """

    def __init__(self, request: ScoreRequest, prompt_tokens: int) -> None:
        self.start = request.start
        self.token_ids: NDArray[np.int32] = request.targets
        self.logprobs: NDArray[np.float32] = np.empty((0, *request.targets.shape[1:]), np.float32)
        self.top1: NDArray[np.int32] = np.empty(0, np.int32)
        self.hidden_states: NDArray[np.float32] | None = None
        self._prompt_tokens = prompt_tokens
        self._wants_hidden_states = request.hidden_states

    @property
    def greedy(self) -> NDArray[np.bool_]:
        """Whether each target is the most probable token, in the shape of `token_ids`."""
        top1 = self.top1 if self.token_ids.ndim == 1 else self.top1[:, None]
        return np.equal(self.token_ids, top1, dtype=bool)

    def receive(self, tensors: Any) -> None:
        """Take the worker's `LogprobsTensors`, made by `runner_v1`; they come once, whole."""
        k = 1 if self.token_ids.ndim == 1 else self.token_ids.shape[1]
        values = tensors.logprobs.numpy()
        self.logprobs = np.array(values[:, :k], np.float32).reshape(self.token_ids.shape)
        self.top1 = np.array(tensors.logprob_token_ids[:, 0].numpy(), np.int32)
        if self._wants_hidden_states:
            self.hidden_states = np.array(values[:, k:], np.float32)

    def __len__(self) -> int:
        return self._prompt_tokens

    @overload
    def __getitem__(self, index: int) -> Row | None: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Row | None]: ...
    def __getitem__(self, index: int | slice) -> Row | Sequence[Row | None] | None:
        if isinstance(index, slice):
            return [self._row(position) for position in range(*index.indices(len(self)))]
        position = index + len(self) if index < 0 else index
        if not 0 <= position < len(self):
            raise IndexError(f"prompt token {index} of a prompt of {len(self)} tokens")
        return self._row(position)

    def _row(self, position: int) -> Row | None:
        from vllm.logprobs import Logprob

        row = position - 1 - self.start
        if not 0 <= row < len(self.logprobs):
            return None
        tokens = np.atleast_1d(self.token_ids[row]).tolist()
        values = np.atleast_1d(self.logprobs[row]).tolist()
        return {t: Logprob(logprob=v) for t, v in zip(tokens, values, strict=True) if t != PAD}

    def __iter__(self) -> Iterator[Row | None]:
        return (self._row(position) for position in range(len(self)))

    def __repr__(self) -> str:
        return f"PromptScores({len(self.logprobs)} of {len(self)} tokens)"


def patch_logprobs_processor(module: ModuleType) -> None:
    """Let `LogprobsProcessor` collect a scoring request's arrays as they are."""

    def from_new_request(stock: Any, cls: Any, tokenizer: Any, request: Any) -> Any:
        processor = stock(tokenizer, request)
        if is_score_request(request.sampling_params):
            asked = ScoreRequest.from_params(request.sampling_params)
            tokens = len(request.prompt_token_ids) + (asked.last_token is not None)
            processor.prompt_logprobs = PromptScores(asked, tokens)
        return processor

    def update_from_output(stock: Any, self: Any, output: Any) -> None:
        if not isinstance(self.prompt_logprobs, PromptScores):
            stock(output)
        elif output.new_prompt_logprobs_tensors is not None:
            self.prompt_logprobs.receive(output.new_prompt_logprobs_tensors)

    replace_method(module, "LogprobsProcessor.from_new_request", from_new_request)
    replace_method(module, "LogprobsProcessor.update_from_output", update_from_output)


def patch_output_processor(module: ModuleType) -> None:
    """Give the whole prompt back, and drop the token that the engine samples at its end."""

    def from_new_request(
        stock: Any, cls: Any, tokenizer: Any, request: Any, *rest: Any, **kw: Any
    ) -> Any:
        state = stock(tokenizer, request, *rest, **kw)
        if is_score_request(request.sampling_params):
            last_token = ScoreRequest.from_params(request.sampling_params).last_token
            if last_token is not None:
                state.prompt_token_ids = [*request.prompt_token_ids, last_token]
        return state

    def new_completion_output(stock: Any, self: Any, token_ids: Any, *rest: Any) -> Any:
        completion = stock(token_ids, *rest)
        if isinstance(self.logprobs_processor.prompt_logprobs, PromptScores):
            completion.token_ids = []
        return completion

    replace_method(module, "RequestState.from_new_request", from_new_request)
    replace_method(module, "RequestState._new_completion_output", new_completion_output)
