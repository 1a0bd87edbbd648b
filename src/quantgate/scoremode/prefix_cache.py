"""Let a scoring request read the prefix cache, but only up to the first row that it scores."""

from types import ModuleType
from typing import Any

from quantgate.scoremode.hooks import replace_method
from quantgate.scoremode.request import ScoreRequest, is_score_request


def patch_kv_cache_manager(module: ModuleType) -> None:
    """Limit cache hits, which are whole blocks, to the rows before `score_start`.

    A row that is read from the cache has no hidden state in this step, so it cannot be scored.
    """

    def get_computed_blocks(stock: Any, manager: Any, request: Any) -> Any:
        if not is_score_request(request.sampling_params):
            return stock(request)
        start = ScoreRequest.from_params(request.sampling_params).start
        hashes = request.block_hashes
        request.block_hashes = hashes[: start // manager.block_pool.hash_block_size]
        try:
            return stock(request)
        finally:
            request.block_hashes = hashes

    replace_method(module, "KVCacheManager.get_computed_blocks", get_computed_blocks)
