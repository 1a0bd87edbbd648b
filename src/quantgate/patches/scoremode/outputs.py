"""The caller's side of score mode: arrays instead of one Python object per token."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from typing import Any, overload

import numpy as np
from numpy.typing import NDArray

from quantgate.patches.scoremode.hooks import hook, vllm_version
from quantgate.patches.scoremode.request import PAD, ScoreRequest, is_score_request

Row = dict[int, Any]


class PromptScores(Sequence[Row | None]):
    """`RequestOutput.prompt_logprobs` of a scoring request.

    Reads like vLLM's own list (`None` for tokens not scored, otherwise `{token_id: Logprob}`), but
    builds each row on access. Code that scores text should use the arrays instead, with one row
    per scored prompt token, from token `start + 1` on:

    `token_ids`      int32 [rows], or [rows, k] with k targets per row
    `logprobs`       float32, of the same shape, in nats; -inf in padded columns
    `top1`           int32 [rows], the most probable token
    `top1_logprobs`  float32 [rows], its log-probability
    `hidden_states`  float32 [rows, H], the last hidden states, or None
    """

    def __init__(self, request: ScoreRequest, prompt_token_ids: list[int]) -> None:
        self._request = request
        self.prompt_token_ids = prompt_token_ids
        self.start = request.start
        self.token_ids: NDArray[np.int32] = request.targets
        self.logprobs: NDArray[np.float32] = np.empty((0, *request.targets.shape[1:]), np.float32)
        self.top1: NDArray[np.int32] = np.empty(0, np.int32)
        self.top1_logprobs: NDArray[np.float32] = np.empty(0, np.float32)
        self.hidden_states: NDArray[np.float32] | None = None

    @property
    def as_list(self) -> bool:
        """Whether the caller (a server) needs a plain list."""
        return self._request.as_list

    @property
    def greedy(self) -> NDArray[np.bool_]:
        """Whether each target is the most probable token, in the shape of `token_ids`."""
        top1 = self.top1 if self.token_ids.ndim == 1 else self.top1[:, None]
        return np.equal(self.token_ids, top1, dtype=bool)

    def receive(self, tensors: Any) -> None:
        """Store the worker's `LogprobsTensors`, made by `batch`; they arrive once, complete."""
        values = tensors.logprobs.numpy()
        end = 1 + self._request.columns
        if not values.shape[1]:
            self._refuse("".join(map(chr, tensors.logprob_token_ids[:, 0].tolist())))
            return
        if not self._expects(*values.shape):
            self._refuse(
                f"score mode does not support vLLM {vllm_version()}: {self._request.rows} rows of "
                f"{end} values were asked for, and {list(values.shape)} came back."
            )
            return
        values = np.array(values, np.float32)  # copied: a view would keep the whole step's values
        self.logprobs = values[:, 1:end].reshape(self.token_ids.shape)
        self.top1 = np.array(tensors.logprob_token_ids[:, 0].numpy(), np.int32)
        self.top1_logprobs = values[:, 0]
        if self._request.hidden_states:
            self.hidden_states = values[:, end:]

    def _expects(self, rows: int, columns: int) -> bool:
        states = columns - 1 - self._request.columns
        fits = states > 0 if self._request.hidden_states else states == 0
        return fits and rows == self._request.rows

    def _refuse(self, reason: str) -> None:
        self._refusal = reason
        for name in ("logprobs", "top1", "top1_logprobs", "hidden_states"):
            delattr(self, name)

    def __getattr__(self, name: str) -> Any:
        """Raise a `ValueError` with the reason if score mode refused the request's model."""
        if refusal := self.__dict__.get("_refusal"):
            raise ValueError(refusal)
        raise AttributeError(f"PromptScores has no {name!r}")

    def __len__(self) -> int:
        return len(self.prompt_token_ids)

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
        top1 = int(self.top1[row])
        answer = {
            token: Logprob(logprob=value, rank=1 if token == top1 else None)
            for token, value in zip(tokens, values, strict=True)
            if token != PAD
        }
        if self._request.top1:
            answer.setdefault(top1, Logprob(logprob=float(self.top1_logprobs[row]), rank=1))
        return answer

    def __iter__(self) -> Iterator[Row | None]:
        return (self._row(position) for position in range(len(self)))

    def __repr__(self) -> str:
        return f"PromptScores({self._request.rows} of {len(self)} tokens)"


@hook("vllm.v1.engine.logprobs", "LogprobsProcessor.from_new_request")
def new_logprobs_processor(
    stock: Any, cls: Any, tokenizer: Any, request: Any, *args: Any, **kwargs: Any
) -> Any:
    """Attach a `PromptScores` to a scoring request's `LogprobsProcessor`."""
    processor = stock(tokenizer, request, *args, **kwargs)
    if is_score_request(request.sampling_params):
        asked = ScoreRequest.from_params(request.sampling_params)
        scores = PromptScores(asked, _whole_prompt(asked, request))
        processor.prompt_logprobs = processor.quantgate_scores = scores
    return processor


@hook("vllm.v1.engine.logprobs", "LogprobsProcessor.update_from_output")
def update_from_output(stock: Any, self: Any, output: Any, *args: Any, **kwargs: Any) -> Any:
    """Store a scoring request's arrays in its `PromptScores`."""
    scores: PromptScores | None = getattr(self, "quantgate_scores", None)
    if scores is None:
        return stock(output, *args, **kwargs)
    if output.new_prompt_logprobs_tensors is not None:
        scores.receive(output.new_prompt_logprobs_tensors)
        if scores.as_list:
            self.prompt_logprobs = _as_list(scores, self)
    return None


def _whole_prompt(asked: ScoreRequest, request: Any) -> list[int]:
    """Return the caller's prompt; the engine's copy lacks the last token."""
    last = [] if asked.last_token is None else [asked.last_token]
    return [*request.prompt_token_ids, *last]


def _as_list(scores: PromptScores, processor: Any) -> list[Row | None] | None:
    """Return the rows with token texts, as a server needs; None, with a log line, if refused."""
    try:
        rows = list(scores)
    except ValueError as refusal:
        logging.getLogger("vllm.quantgate").error("%s", refusal)
        return None
    if processor.tokenizer is not None:
        from vllm.tokenizers.detokenizer_utils import convert_ids_list_to_tokens

        prompt = scores.prompt_token_ids
        for position, row in enumerate(rows):
            if row is None:
                continue
            texts = convert_ids_list_to_tokens(processor.tokenizer, list(row))
            before = prompt[max(0, position - 4) : position]  # 4 bytes make any character
            texts = processor._verify_tokens(texts, list(row), before)
            for logprob, text in zip(row.values(), texts, strict=True):
                logprob.decoded_token = text
    return rows


@hook("vllm.v1.engine.output_processor", "RequestState.from_new_request")
def new_request_state(
    stock: Any, cls: Any, tokenizer: Any, request: Any, *args: Any, **kwargs: Any
) -> Any:
    """Return a scoring request's whole prompt to the caller."""
    state = stock(tokenizer, request, *args, **kwargs)
    if (scores := getattr(state.logprobs_processor, "quantgate_scores", None)) is not None:
        state.prompt_token_ids = scores.prompt_token_ids
    return state


@hook("vllm.v1.engine.output_processor", "RequestState._new_completion_output")
def new_completion_output(stock: Any, self: Any, token_ids: Any, *args: Any, **kwargs: Any) -> Any:
    """Drop the token that the engine samples at the end of a scored prompt."""
    completion = stock(token_ids, *args, **kwargs)
    if getattr(self.logprobs_processor, "quantgate_scores", None) is not None:
        completion.token_ids, completion.text = [], ""
    return completion
