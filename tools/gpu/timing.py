"""Running ways to score in turn: their seconds, their memory, and what score mode's hooks take."""

import functools
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from quantgate.patches.scoremode import logprob
from quantgate.patches.scoremode.hooks import HOOKS

MIB = 2**20
Modes = Mapping[str, Callable[[], object]]
Rounds = dict[str, list[list[float]]]
"""By mode: seconds and MiB of each round."""


def peak_memory(run: Callable[[], object]) -> tuple[float, float]:
    """Run once; return seconds, and MiB that the process grew by at its peak."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    else:
        Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark
        before = _resident("VmRSS")
    started = time.perf_counter()
    run()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    seconds = time.perf_counter() - started
    peak = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else _resident("VmHWM")
    return seconds, (peak - before) / MIB


def _resident(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}")


class HookTime:
    """The seconds that score mode's hooks took: without vLLM's own methods and the scoring core.

    To be made before vLLM is imported, which is when the hooks are installed.
    """

    def __init__(self) -> None:
        self.seconds = 0.0
        self.counting = False
        for index, declared in enumerate(HOOKS):
            if not declared.is_async:
                HOOKS[index] = replace(declared, replacement=self._timed(declared.replacement))
        logprob.score_rows = self._left_out(logprob.score_rows)

    def of(self, run: Callable[[], object]) -> float:
        """Return the seconds that hooks take in a run, which takes a little longer for that."""
        self.seconds, self.counting = 0.0, True
        try:
            run()
        finally:
            self.counting = False
        return self.seconds

    def _timed(self, replacement: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(replacement)
        def timed(stock: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            if not self.counting:
                return replacement(stock, *args, **kwargs)
            started = time.perf_counter()
            answer = replacement(self._left_out(stock), *args, **kwargs)
            self.seconds += time.perf_counter() - started
            return answer

        return timed

    def _left_out(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def left_out(*args: Any, **kwargs: Any) -> Any:
            if not self.counting:
                return function(*args, **kwargs)
            started = time.perf_counter()
            answer = function(*args, **kwargs)
            self.seconds -= time.perf_counter() - started
            return answer

        return left_out


def measure(modes: Modes, rounds: int) -> Rounds:
    """Run the modes in turn: one round to warm up, then the counted ones. [seconds, MiB] each."""
    figures: Rounds = {name: [] for name in modes}
    for turn in range(rounds + 1):
        for name, run in modes.items():
            seconds, mebibytes = peak_memory(run)
            print(f"  round {turn}: {name} {seconds:.2f} s", file=sys.stderr, flush=True)
            if turn:
                figures[name].append([seconds, mebibytes])
    return figures


def costs(modes: Modes, figures: Rounds, hooks: HookTime) -> dict[str, float]:
    """Return the seconds that score mode takes beyond prefill: medians over the rounds.

    `beyond_s` all of them but those of the head alone, `hooks_s` those in its own code.
    """
    rounds = zip(*(figures[name] for name in ("score", "prefill", "head")), strict=True)
    beyond = [score[0] - prefill[0] - head[0] for score, prefill, head in rounds]
    own = [hooks.of(modes["score"]) - hooks.of(modes["prefill"]) for _ in beyond]
    return {"beyond_s": statistics.median(beyond), "hooks_s": statistics.median(own)}
