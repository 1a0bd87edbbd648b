"""Ways of serving the same windows that must not change results: chunks, order, batch, cache."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from quantgate.measuring import session
from quantgate.measuring.measurement import Measurement, Provenance
from quantgate.subject.task import GENERATE
from quantgate.subject.windows import part_of, rows_of

if TYPE_CHECKING:
    from vllm import LLM

    from quantgate.subject.probe import Probe

# The chunk size, in tokens, of an engine that cuts prompts into chunks.
CHUNK = 64
Rows = NDArray[np.int64]


@dataclass(frozen=True)
class Reruns:
    """One probe, served again by one engine in several ways."""

    how: str
    """What they all have in common, e.g. "in chunks of 64 tokens"."""
    found: Mapping[str, Measurement]
    """By way of serving: in order, shuffled, one by one."""
    cached: tuple[Rows, NDArray[np.float32]] | None = None
    """Rows [m] whose windows began in the prefix cache, and their log-probabilities; None if
    nothing was cached, or for a pooling model."""


def can_cut(llm: LLM) -> bool:
    """Whether a running engine can be told to chunk prompts: in this process, and able to."""
    return _cutting_scheduler(llm) is not None


def chunking(*, chunked: bool) -> dict[str, Any]:
    """Return the `vllm.LLM` arguments that cut prompts into chunks; {} leaves them whole."""
    if chunked:
        return {"enable_chunked_prefill": True, "max_num_batched_tokens": CHUNK}
    return {}


def reruns(llm: LLM, probe: Probe, dtype: str, *, chunked: bool) -> Reruns:
    """Serve a probe in order, shuffled and one by one, and its cached prefixes from the cache.

    `chunked` cuts prompts into chunks, in any engine that `can_cut`, or that `chunking` started.
    """
    windows = range(len(probe.windows))
    shuffled: list[int] = np.random.default_rng(0).permutation(len(windows)).tolist()
    ways: dict[str, Sequence[Sequence[int]]] = {
        "in order": [windows],
        "shuffled": [shuffled],
        "one by one": [[window] for window in windows],
    }
    provenance = session.provenance_of(llm, dtype)
    found = {}
    with _in_chunks(llm) if chunked else nullcontext():
        for way, batches in ways.items():
            llm.reset_prefix_cache()  # reuse nothing from what was served before
            found[way] = in_batches(llm, probe, batches, provenance)
        cached = _from_the_cache(llm, probe) if probe.task == GENERATE else None
    return Reruns(f"in chunks of {CHUNK} tokens" if chunked else "prompts whole", found, cached)


@contextmanager
def _in_chunks(llm: LLM) -> Iterator[None]:
    """Have the scheduler take `CHUNK` tokens per step, so that longer prompts are cut.

    Kernels and buffers stay as they are: results equal those of an engine started with this limit.
    """
    scheduler = _cutting_scheduler(llm)
    if scheduler is None:
        yield
        return
    whole = scheduler.max_num_scheduled_tokens
    try:
        scheduler.max_num_scheduled_tokens = min(whole, CHUNK)
        yield
    finally:
        scheduler.max_num_scheduled_tokens = whole


def _cutting_scheduler(llm: LLM) -> Any:
    """Return the scheduler of an engine that cuts prompts; None if it is out of reach."""
    core = getattr(llm.llm_engine.engine_core, "engine_core", None)  # None in another process
    scheduler = getattr(core, "scheduler", None)
    cuts = llm.llm_engine.vllm_config.scheduler_config.enable_chunked_prefill
    return scheduler if cuts and hasattr(scheduler, "max_num_scheduled_tokens") else None


def in_batches(
    llm: LLM, probe: Probe, batches: Sequence[Sequence[int]], provenance: Provenance
) -> Measurement:
    """Serve batches of windows one after another; return the rows in the probe's order."""
    parts = [session.serve(llm, part_of(probe, batch), provenance) for batch in batches]
    order = np.argsort(np.concatenate([rows_of(probe, batch) for batch in batches]))
    hidden = [part.hidden for part in parts if part.hidden is not None]
    return Measurement(
        np.concatenate([part.values for part in parts])[order],
        np.concatenate([part.top1 for part in parts])[order],
        provenance,
        np.concatenate(hidden)[order] if hidden else None,
    )


def _from_the_cache(llm: LLM, probe: Probe) -> tuple[Rows, NDArray[np.float32]] | None:
    """Score the second half of each window, whose first half the engine has in its prefix cache."""
    starts = [max(w.score_from - 1, len(w.ids) // 2) for w in probe.windows]
    found = session.generate_scores(
        llm,
        [window.ids for window in probe.windows],
        [{"score_start": start} for start in starts],
    )
    if not any(output.num_cached_tokens for output in found):
        return None
    # Row i of a window scores its token score_from + i; the first one here scores start + 1.
    rows = [
        rows_of(probe, [index])[start + 1 - window.score_from :]
        for index, (window, start) in enumerate(zip(probe.windows, starts, strict=True))
    ]
    values = [output.prompt_logprobs.logprobs for output in found]
    return np.concatenate(rows), np.concatenate(values)
