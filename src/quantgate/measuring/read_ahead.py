"""Read the next part of something from disk while the current part is in use."""

from __future__ import annotations

from collections.abc import Callable, Generator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

Part = TypeVar("Part")


def read_ahead(read: Callable[[int], Part], count: int) -> Generator[Part]:
    """Yield `read(0)` … `read(count - 1)`; a thread reads each while the one before is in use.

    At most two parts exist at a time: no reference to a yielded one is kept. An error from `read`
    is raised when its part is requested. `close()` waits for the read in progress, so no thread
    outlives the generator.
    """
    with ThreadPoolExecutor(1, "read-ahead") as pool:
        waiting = pool.submit(read, 0)
        for index in range(1, count + 1):
            ready = [waiting.result()]
            if index < count:
                waiting = pool.submit(read, index)
            else:
                del waiting
            yield ready.pop()
