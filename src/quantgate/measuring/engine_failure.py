"""Handles engine failures: one sentence to report, and no state left for the next engine."""

from __future__ import annotations

import threading
import time
import traceback
import weakref
from collections.abc import Iterator
from concurrent.futures import InvalidStateError
from contextlib import contextmanager, suppress
from typing import Any

from quantgate.errors import BadInput, printable

_OUT_OF_MEMORY = (
    "out of memory",
    "can't allocate memory",
    "cannot allocate memory",
    "alloc failed",  # oneDNN
    "alloc_failed",  # cuBLAS
    "bad_alloc",
)
_DRIVER = ("cuda error", "cudnn error", "cublas error", "nccl error", "unspecified launch failure")
# Programming errors, which need their traceback.
MISTAKES = (AssertionError, AttributeError, LookupError, NameError, TypeError)
# How vLLM reports that one of its processes died, and gloo that a rank did, depending on which
# process notices first.
_ENDED = (
    "cancelled",
    "process has ended",
    "executor failed",
    "workerproc initialization failed",
    "engine core initialization failed",
    "enginecore encountered an issue",
    "connection closed by peer",
    "connection reset by peer",
    "remote worker crashing",
)
_LESS_MEMORY = (
    "give it more ranks ([engine] tensor_parallel_size), fewer tokens at a time (max_model_len, "
    "max_num_batched_tokens) or less of a KV cache (kv_cache_memory_bytes, gpu_memory_utilization)"
)


class EngineFailure(RuntimeError):
    """vLLM could not load or score a checkpoint; the message gives the reason."""

    def __str__(self) -> str:
        return printable(super().__str__())  # it may contain tensor names


class LostDevice(EngineFailure):
    """The device failed under an engine, and this process can no longer use it."""


_lost = ""


def require_device() -> None:
    """Raise `LostDevice` if an earlier engine of this process left the device unusable."""
    if _lost:
        raise LostDevice(_lost)


@contextmanager
def explained(said: str, *, but: tuple[type[Exception], ...] = ()) -> Iterator[None]:
    """Turn errors that vLLM raises, except those in `but`, into a one-sentence `EngineFailure`.

    `said` begins it, e.g. "build/x: vLLM 0.32.0 cannot load it in float32". The error's frames are
    cleared: otherwise they keep their tensors alive for as long as a report keeps the error.
    """
    try:
        yield
    except (BadInput, EngineFailure):
        raise
    except Exception as error:
        if isinstance(error, but) and not _is_vllms_refusal(error):
            raise
        traceback.clear_frames(error.__traceback__)
        raise _failure(said, error) from error


def _is_vllms_refusal(error: Exception) -> bool:
    """Whether vLLM failed an assertion or its build lacks an operator: no error of the caller's."""
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    raised_in = frames[-1].f_globals.get("__name__", "") if frames else ""
    asserted = isinstance(error, AssertionError) and raised_in.startswith("vllm.")
    return asserted or (isinstance(error, AttributeError) and raised_in == "torch._ops")


def _failure(said: str, error: Exception) -> EngineFailure:
    said = f"{said} ({type(error).__name__}: {first_line(error)})"
    text = f"{type(error).__name__} {error}".lower()
    if isinstance(error, MemoryError) or any(words in text for words in _OUT_OF_MEMORY):
        return EngineFailure(f"{said}: out of memory; {_LESS_MEMORY}.")
    if any(words in text for words in _DRIVER):
        if not _device_answers():
            _lose(said)
        return EngineFailure(
            f"{said}: the driver reports a fault; CUDA_LAUNCH_BLOCKING=1 names the kernel, "
            "`nvidia-smi` and `dmesg` say how the GPU is."
        )
    if any(words in text for words in _ENDED):
        return EngineFailure(
            f"{said}: a process of vLLM's has ended; what it said is in the output, and `dmesg` "
            "says whether it was killed for want of memory."
        )
    return EngineFailure(f"{said}.")


def _device_answers() -> bool:
    """Whether this process can still use its GPUs: after an illegal access it never can."""
    import torch

    if not torch.cuda.is_available():
        return True
    try:
        torch.cuda.synchronize()
    except Exception:
        return False
    return True


def _lose(said: str) -> None:
    global _lost
    _lost = (
        f"not served, because the GPU was lost to this process when {said}; gate the others in a "
        "run of their own."
    )


def end_waiting_when_it_dies(client: Any) -> None:
    """Stop waiting for an engine in a separate process when that process is killed.

    vLLM 0.32.0 notices that it died and reports it to later requests, but never wakes pending ones.
    """
    if not hasattr(client, "outputs_queue"):
        return  # it runs in this process
    reference = weakref.ref(client)

    def watch() -> None:
        while (client := reference()) is not None:
            if client.resources.engine_dead:
                error = RuntimeError("the engine's process has ended")
                client.outputs_queue.put_nowait(error)
                for waiting in list(client.utility_results.values()):
                    with suppress(InvalidStateError):
                        waiting.set_exception(error)
                return
            del client
            time.sleep(1)

    threading.Thread(target=watch, daemon=True, name="quantgate: is the engine alive?").start()


def first_line(error: Exception) -> str:
    """Return the first line of an error's message; "" if it has none.

    The first line of a pydantic error only counts its parts, so the first part's is returned.
    """
    if callable(parts := getattr(error, "errors", None)):
        return str(parts()[0].get("msg", ""))
    return (str(error).strip().splitlines() or [""])[0]
