"""What vLLM's attention does otherwise than HF's: bfloat16 cut off, keys and values in FP8."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from quantgate.formats.activations import fp8_cached
from quantgate.formats.builds import truncate_to_bfloat16

if TYPE_CHECKING:
    import torch


class Fp8KVCache:
    """Gives keys and values back as an FP8 (E4M3) cache would: divided, rounded, multiplied."""

    def __init__(self, scales: Callable[[int], tuple[float, float]]) -> None:
        self.scales = scales

    def update(
        self, key: torch.Tensor, value: torch.Tensor, layer_idx: int, *_: Any, **__: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return a layer's keys and values as they are read back."""
        key_scale, value_scale = self.scales(layer_idx)
        return fp8_cached(key, key_scale), fp8_cached(value, value_scale)

    def get_seq_length(self, *_: Any) -> int:
        """Return how many tokens it holds from before: none."""
        return 0


def _truncating_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    **options: Any,
) -> tuple[torch.Tensor, None]:
    """HF's sdpa attention, with bfloat16 cut off as vLLM's AVX2 build does it (`builds`).

    Queries and keys come rotated in float32; all are [windows, heads, tokens, width].
    """
    import torch
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    query, key = (truncate_to_bfloat16(x.float()).float() for x in (query, key))
    found, _ = sdpa_attention_forward(module, query, key, value.float(), mask, **options)
    assert isinstance(found, torch.Tensor)
    return truncate_to_bfloat16(found), None


@functools.cache
def truncating_attention_name() -> str:
    """Return the name by which HF's models find the attention that truncates."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    name = "quantgate_truncating"
    AttentionInterface.register(name, _truncating_attention)
    AttentionMaskInterface.register(name, sdpa_mask)
    return name


def in_float32(positions: Any) -> Any:
    """Return cosines and sines in float32, so that what is rotated by them is not rounded."""
    return None if positions is None else tuple(part.float() for part in positions)
