"""The caller's side of score mode: arrays instead of one Python object per token."""

from collections.abc import Iterator, Sequence
from types import ModuleType
from typing import Any, overload

import numpy as np
from numpy.typing import NDArray

from quantgate.scoremode.hooks import replace_method
from quantgate.scoremode.params import is_score_request

Row = dict[int, Any]


class PromptScores(Sequence[Row | None]):
    """`RequestOutput.prompt_logprobs` of a scoring request.

    Reads like vLLM's own list (`None` for the first token, then `{token_id: Logprob}` a token),
    built row by row as it is read. Code that scores text should take the arrays instead, each
    over prompt tokens 1 … n: `token_ids` int32 [n], `logprobs` float32 [n] in nats, `top1`
    int32 [n], the most probable token where `token_ids` was the actual one.
    """

    def __init__(self) -> None:
        self.token_ids: NDArray[np.int32] = np.empty(0, np.int32)
        self.logprobs: NDArray[np.float32] = np.empty(0, np.float32)
        self.top1: NDArray[np.int32] = np.empty(0, np.int32)

    def receive(self, tensors: Any) -> None:
        """Take the worker's `LogprobsTensors`, made by `runner_v1`; they come once, whole."""
        self.token_ids = tensors.logprob_token_ids[:, 0].numpy().astype(np.int32)
        self.logprobs = tensors.logprobs[:, 0].numpy().astype(np.float32)
        self.top1 = tensors.selected_token_ranks.numpy().astype(np.int32)

    def __len__(self) -> int:
        return len(self.logprobs) + 1

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

        if position == 0:
            return None
        token = int(self.token_ids[position - 1])
        return {token: Logprob(logprob=float(self.logprobs[position - 1]))}

    def __iter__(self) -> Iterator[Row | None]:
        return (self._row(position) for position in range(len(self)))

    def __repr__(self) -> str:
        return f"PromptScores({len(self.logprobs)} tokens, sum {self.logprobs.sum():.4f} nat)"


def patch_logprobs_processor(module: ModuleType) -> None:
    """Let `LogprobsProcessor` collect a scoring request's arrays as they are."""

    def from_new_request(stock: Any, cls: Any, tokenizer: Any, request: Any) -> Any:
        processor = stock(tokenizer, request)
        if is_score_request(request.sampling_params):
            processor.prompt_logprobs = PromptScores()
        return processor

    def update_from_output(stock: Any, self: Any, output: Any) -> None:
        if not isinstance(self.prompt_logprobs, PromptScores):
            stock(output)
        elif output.new_prompt_logprobs_tensors is not None:
            self.prompt_logprobs.receive(output.new_prompt_logprobs_tensors)

    replace_method(module, "LogprobsProcessor.from_new_request", from_new_request)
    replace_method(module, "LogprobsProcessor.update_from_output", update_from_output)


def patch_output_processor(module: ModuleType) -> None:
    """Drop the token that the engine samples at the end of a scored prompt."""

    def new_completion_output(stock: Any, self: Any, token_ids: Any, *rest: Any) -> Any:
        completion = stock(token_ids, *rest)
        if isinstance(self.logprobs_processor.prompt_logprobs, PromptScores):
            completion.token_ids = []
        return completion

    replace_method(module, "RequestState._new_completion_output", new_completion_output)
