"""Let a scoring request read the prefix cache, but only up to the first row that it scores."""

from typing import Any

import wrapt

from quantgate.patches.scoremode.hooks import hook
from quantgate.patches.scoremode.request import ScoreRequest, is_score_request

MANAGER = "vllm.v1.core.kv_cache_manager"


class _ReadUpTo(wrapt.ObjectProxy):  # type: ignore[type-arg]
    """A vLLM request whose cache lookup ends after `start` tokens.

    vLLM looks up one token fewer than a request has, so that there is one left to compute.
    """

    def __init__(self, request: Any, start: int) -> None:
        super().__init__(request)
        self._self_start = start

    @property
    def num_tokens(self) -> int:
        return min(int(self.__wrapped__.num_tokens), self._self_start + 1)


@hook(MANAGER, "KVCacheManager.get_computed_blocks")
@hook(MANAGER, "KVCacheManager.get_computed_blocks_for_connector", optional=True)
def get_computed_blocks(
    stock: Any,
    manager: Any,
    request: Any,
    max_cache_hit_length: int | None = None,
    *args: Any,
    **kwargs: Any,
) -> Any:
    """End the cache lookup of a scoring request at `score_start`.

    A row read from the cache has no hidden state in this step, so it cannot be scored. Each kind
    of cache (full attention, sliding window, Mamba) finds the longest hit that it can resume
    from. `max_cache_hit_length` exists from vLLM 0.33.0 on.
    """
    limit = max_cache_hit_length
    params = getattr(request, "sampling_params", None)
    # A request that scores from row 0 on does not read the cache at all (see `params`).
    if is_score_request(params) and (start := ScoreRequest.from_params(params).start):
        request = _ReadUpTo(request, start)
        limit = None if limit is None else min(limit, start)
    given = () if limit is None and not args else (limit, *args)
    return stock(request, *given, **kwargs)
