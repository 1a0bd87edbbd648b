"""The head alone: score mode's kernel and its alternatives, their time and their precision."""

import statistics
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

FLOOR, SCORE_MODE, PLAIN = "cuBLAS bfloat16", "score mode", "cuBLAS float32 + logsumexp"
# Rows whose scores are compared with float64, and columns that it multiplies at a time.
EXACT_ROWS, EXACT_COLUMNS = 256, 8192
# Few rows take so little time that one call would measure how it is launched.
ROWS_A_ROUND = 2048
PLAIN_ROWS = 1024

Run = Callable[["Tensor", "Tensor"], Any]


@dataclass(frozen=True)
class Figures:
    """What one candidate did; in milliseconds and nats, None where it was not measured."""

    milliseconds: float | None = None
    of_floor: float | None = None
    error: float | None = None
    batch: float | None = None
    """How far a row's score is from that of the row in a smaller batch, at most."""
    failed: str | None = None


@dataclass(frozen=True)
class Work:
    """Random hidden states, a head, and targets, for logits of standard deviation 1.3."""

    hidden: "Tensor"
    weight: "Tensor"
    targets: "Tensor"

    @classmethod
    def random(cls, rows: int, hidden_size: int, vocab: int, device: str) -> "Work":
        """Draw the same numbers on the same device each time."""
        import torch

        generator = torch.Generator(device).manual_seed(0)
        weight = torch.randn(vocab, hidden_size, device=device, generator=generator)
        hidden = torch.randn(rows, hidden_size, device=device, generator=generator)
        targets = torch.randint(vocab, (rows, 1), device=device, generator=generator)
        return cls(hidden.bfloat16(), (weight * 1.28 / hidden_size**0.5).bfloat16(), targets)

    def exact(self) -> "Tensor":
        """Return the first rows' log-probabilities in float64."""
        import torch

        hidden, targets = self.hidden[:EXACT_ROWS].double(), self.targets[:EXACT_ROWS, 0]
        log_total = hidden.new_full((len(hidden),), -torch.inf)
        for first in range(0, len(self.weight), EXACT_COLUMNS):
            logits = hidden @ self.weight[first : first + EXACT_COLUMNS].double().T
            log_total = torch.logaddexp(log_total, logits.logsumexp(dim=1))
        return (hidden * self.weight[targets].double()).sum(dim=1) - log_total


def candidates(work: Work) -> dict[str, Run]:
    """Return what is measured: name, and what takes hidden rows and targets; the floor first."""
    import torch

    from gpu import head_candidates  # and Triton, which reads now if it is to interpret
    from quantgate.patches.scoremode.logprob import score_rows
    from quantgate.patches.scoremode.reduction import Head

    head = Head(work.weight)

    def plain(hidden: "Tensor", targets: "Tensor") -> "Tensor":
        scores = []
        for start in range(0, len(hidden), PLAIN_ROWS):
            own = slice(start, start + PLAIN_ROWS)
            logits = head_candidates.product(hidden[own], work.weight, 1)[0]
            logits.argmax(dim=1)
            scores.append(logits.gather(1, targets[own]) - logits.logsumexp(dim=1, keepdim=True))
        return torch.cat(scores)

    def by(reduce: head_candidates.Reduce) -> Run:
        def run(hidden: "Tensor", targets: "Tensor") -> "Tensor":
            # Triton's interpreter would multiply the bits of bfloat16 as integers.
            rows = hidden if hidden.is_cuda else hidden.float()
            return head_candidates.score_by(reduce, head, rows, targets).logprob

        return run

    found: dict[str, Run] = {
        FLOOR: lambda hidden, _: hidden @ work.weight.T,
        SCORE_MODE: lambda hidden, targets: score_rows(head, hidden, targets).logprob,
        PLAIN: plain,
    }
    others = head_candidates.reductions(work.hidden, len(work.weight))
    return found | {name: by(run) for name, run in others}


def milliseconds(run: Callable[[], object], calls: int) -> float:
    """Return the time of one of some calls in a row, from the first to the end of the last."""
    import torch

    def wait() -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()

    wait()
    started = time.perf_counter()
    for _ in range(calls):
        run()
    wait()
    return (time.perf_counter() - started) * 1000 / calls


def precision(run: Run, work: Work, exact: "Tensor") -> tuple[float, float]:
    """Return the largest error, and how far scores of smaller batches are from the whole one's."""
    whole = run(work.hidden, work.targets)
    error = (whole[: len(exact), 0].double() - exact).abs().max()
    rows = len(work.hidden)
    batches = {(0, 1), (rows // 2, rows), (rows // 3, min(rows, rows // 3 + 65))}
    moved = [
        (run(work.hidden[low:high], work.targets[low:high]) - whole[low:high]).abs().max()
        for low, high in batches
    ]
    return float(error), float(max(moved))


def measure(work: Work, chosen: Mapping[str, Run], rounds: int) -> dict[str, Figures]:
    """Measure precision, then time all that works in turn; the first round warms up."""
    calls = max(1, ROWS_A_ROUND // len(work.hidden)) if work.hidden.is_cuda else 1
    exact = work.exact()
    precise: dict[str, tuple[float, float] | None] = {}
    figures: dict[str, Figures] = {}
    for name, run in chosen.items():
        print(f"  {name}", file=sys.stderr, flush=True)
        try:
            precise[name] = None if name == FLOOR else precision(run, work, exact)
        except Exception as error:  # too little memory, or a kernel that this device does not take
            figures[name] = Figures(failed=f"{type(error).__name__}: {error}".splitlines()[0])
    times: dict[str, list[float]] = {name: [] for name in precise}
    for turn in range(rounds + 1):
        for name in times:
            taken = milliseconds(partial(chosen[name], work.hidden, work.targets), calls)
            if turn:
                times[name].append(taken)
    for name, taken_by_round in times.items():
        ratios = [t / f for t, f in zip(taken_by_round, times[FLOOR], strict=True)]
        error_and_batch = precise[name] or (None, None)
        figures[name] = Figures(
            statistics.median(taken_by_round), statistics.median(ratios), *error_and_batch
        )
    return {name: figures[name] for name in chosen}
