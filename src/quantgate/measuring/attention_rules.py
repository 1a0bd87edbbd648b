"""Where vLLM's attention differs from HF's: truncated bfloat16, keys and values in FP8."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from quantgate.formats.activations import fp8_cached
from quantgate.formats.builds import truncate_to_bfloat16

if TYPE_CHECKING:
    import torch


class Fp8KVCache:
    """Returns keys and values as an FP8 (E4M3) cache would: divided, rounded, multiplied."""

    def __init__(self, scales: Callable[[int], tuple[float, float]]) -> None:
        self.scales = scales

    def update(
        self, key: torch.Tensor, value: torch.Tensor, layer_idx: int, *_: Any, **__: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return a layer's keys and values as they are read back."""
        key_scale, value_scale = self.scales(layer_idx)
        return fp8_cached(key, key_scale), fp8_cached(value, value_scale)

    def get_seq_length(self, *_: Any) -> int:
        """Return how many earlier tokens the cache holds: none."""
        return 0


def _truncating_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    **options: Any,
) -> tuple[torch.Tensor, None]:
    """HF's sdpa attention, truncating to bfloat16 as vLLM's AVX2 build does (`builds`).

    Queries and keys are passed rotated, in float32; all are [windows, heads, tokens, width].
    """
    import torch
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    query, key = (truncate_to_bfloat16(x.float()).float() for x in (query, key))
    found, _ = sdpa_attention_forward(module, query, key, value.float(), mask, **options)
    assert isinstance(found, torch.Tensor)
    return truncate_to_bfloat16(found), None


@functools.cache
def truncating_attention_name() -> str:
    """Return the name under which HF's models look up the truncating attention."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    name = "quantgate_truncating"
    AttentionInterface.register(name, _truncating_attention)
    AttentionMaskInterface.register(name, sdpa_mask)
    return name


def in_float32(positions: Any) -> Any:
    """Return cosines and sines in float32, so that rotating does not round."""
    return None if positions is None else tuple(part.float() for part in positions)
