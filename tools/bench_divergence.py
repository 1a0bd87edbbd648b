"""Time exact KL divergence beside the two head products that it cannot do without; weigh its files.

    python tools/bench_divergence.py

Ratios of one interleaved run: machines are noisy. The default is a head of 4,096 inputs and 128,256
tokens, as an 8B model has it; two of them take 4 GiB.
"""

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
from rich.progress import track

from quantgate.measuring.cache import DiskCache
from quantgate.measuring.codec import to_arrays
from quantgate.measuring.divergence import Side, divergence
from quantgate.measuring.measurement import Measurement, Provenance

ALLOWED_RATIO = 1.5
SMALLEST_SAVING = 20.0


def sides(rows: int, hidden: int, vocabulary: int) -> tuple[list[Side], list[torch.Tensor]]:
    """Return a base and a model beside it, and their heads; hidden states are bfloat16's."""
    generator = torch.Generator().manual_seed(0)
    made, heads = [], []
    for _ in range(2):
        head = torch.randn(vocabulary, hidden, generator=generator) / hidden**0.5
        states = torch.randn(rows, hidden, generator=generator).bfloat16().float()
        made.append(
            Side(states.numpy(), partial(torch.nn.functional.linear, weight=head), vocabulary)
        )
        heads.append(head)
    return made, heads


def seconds(call: Callable[[], object]) -> float:
    """Return how long a call takes."""
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def size_of(directory: Path) -> int:
    """Return the bytes of all files in a directory."""
    return sum(path.stat().st_size for path in directory.iterdir())


def saving(base: Side, vocabulary: int) -> float:
    """Return how many times smaller a cache entry is than 16-bit log-probabilities, as files."""
    rows = len(base.hidden)
    provenance = Provenance("engine", "cpu", "cpu", "bfloat16")
    measured = Measurement(
        np.zeros(rows, np.float32), np.zeros(rows, np.int32), provenance, base.hidden
    )
    with tempfile.TemporaryDirectory() as ours, tempfile.TemporaryDirectory() as theirs:
        DiskCache(Path(ours)).write({}, to_arrays(measured))
        np.save(Path(theirs) / "log_probs.npy", np.zeros((rows, vocabulary), np.uint16))
        return size_of(Path(theirs)) / size_of(Path(ours))


def main() -> int:
    """Print both ratios; 1 where one of them is not what is promised."""
    parser = argparse.ArgumentParser(description="Time exact KL divergence, weigh its files.")
    parser.add_argument("--rows", type=int, default=512)
    parser.add_argument("--hidden", type=int, default=4096)
    parser.add_argument("--vocabulary", type=int, default=128_256)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    (base, other), heads = sides(arguments.rows, arguments.hidden, arguments.vocabulary)
    targets = np.zeros(arguments.rows, np.int64)

    def products() -> None:
        for side, head in zip((base, other), heads, strict=True):
            torch.from_numpy(side.hidden) @ head.T

    times: list[tuple[float, float]] = []
    for _ in track(range(arguments.rounds + 1), "Timing"):
        times.append((seconds(products), seconds(lambda: divergence(base, other, targets))))
    ratio = statistics.median(whole / part for part, whole in times[1:])
    smaller = saving(base, arguments.vocabulary)
    print(f"divergence takes {ratio:.2f} x the two head products (at most {ALLOWED_RATIO})")
    print(f"its file is {smaller:.1f} x smaller than 16-bit log-probs (at least {SMALLEST_SAVING})")
    return int(ratio > ALLOWED_RATIO or smaller < SMALLEST_SAVING)


if __name__ == "__main__":
    sys.exit(main())
