"""Find the language-model head of a loaded vLLM model of any architecture."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from quantgate.patches.scoremode.reduction import Head

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    import torch


class HeadRefused(ValueError):
    """Score mode cannot be exact with this model's head; the message says why."""


def find_head(
    compute_logits: Callable[[torch.Tensor], Any], hidden: torch.Tensor
) -> tuple[Head, torch.Tensor]:
    """Return a model's head, and the rows [n, H] that the model applies it to.

    `compute_logits`, the model's bound method, is called with vLLM's `LogitsProcessor` intercepted,
    so the returned rows include whatever the model does to hidden states first. `HeadRefused` names
    the model if it changes the logits afterwards, computes them another way, or has a quantized
    head, because scores would be wrong.
    """
    with _logits_processor_held_back() as calls:
        answer = compute_logits(hidden)
    model = type(getattr(compute_logits, "__self__", compute_logits)).__name__
    if len(calls) != 1 or answer is not calls[0][0]:
        raise HeadRefused(
            f"score mode does not support {model}: its compute_logits does more "
            "than apply one head through vLLM's LogitsProcessor."
        )
    _, processor, lm_head, rows, bias = calls[0]
    if processor.logits_as_input:
        raise HeadRefused(f"score mode does not support {model}: it has no language-model head.")
    try:
        return _head(processor, lm_head, bias), rows
    except AttributeError as error:  # this vLLM builds the head differently
        raise HeadRefused(f"score mode does not support the head of {model}: {error}.") from error


@contextmanager
def _logits_processor_held_back() -> Iterator[list[tuple[Any, ...]]]:
    from vllm.model_executor.layers.logits_processor import LogitsProcessor

    calls: list[tuple[Any, ...]] = []
    stock = LogitsProcessor.forward

    def hold_back(
        processor: Any,
        lm_head: Any,
        hidden_states: Any,
        embedding_bias: Any = None,
        *_: Any,
        **__: Any,
    ) -> Any:
        answer = hidden_states.new_empty(0)
        calls.append((answer, processor, lm_head, hidden_states, embedding_bias))
        return answer

    LogitsProcessor.forward = hold_back
    try:
        yield calls
    finally:
        LogitsProcessor.forward = stock


def _head(processor: Any, lm_head: Any, bias: torch.Tensor | None) -> Head:
    from vllm.model_executor.layers.linear import UnquantizedLinearMethod
    from vllm.model_executor.layers.vocab_parallel_embedding import UnquantizedEmbeddingMethod

    if not isinstance(lm_head.quant_method, UnquantizedEmbeddingMethod | UnquantizedLinearMethod):
        raise HeadRefused(
            "score mode does not support a quantized head "
            f"({type(lm_head.quant_method).__name__}); add lm_head to the recipe's ignore list."
        )
    shard = lm_head.shard_indices
    size = shard.num_org_elements  # without the padding of the vocabulary
    return Head(
        weight=lm_head.weight[:size],
        bias=None if bias is None else bias[:size],
        first_token=shard.org_vocab_start_index,
        soft_cap=processor.soft_cap,
        scale=processor.scale,
        all_gather=_all_gather if lm_head.tp_size > 1 else None,
    )


def _all_gather(tensor: torch.Tensor) -> torch.Tensor:
    from vllm.distributed import tensor_model_parallel_all_gather

    gathered: torch.Tensor = tensor_model_parallel_all_gather(tensor, dim=-1)
    return gathered
