"""Model how tensor cores add up, and what adding up in blocks of the depth does to a score's error.

    python tools/simulate_tensor_cores.py
    python tools/simulate_tensor_cores.py --hidden 896 --step 8

A tensor core adds a few products and the accumulator in fixed point: each is aligned to the largest
and truncated, and so is the float32 sum (Fasi, Higham, Mikaitis and Pranesh, "Numerical behavior of
NVIDIA tensor cores", PeerJ Computer Science 7:e330, 2021; bit by bit for V100 to B200: Khattak and
Mikaitis, "Accurate models of NVIDIA tensor cores", arXiv 2512.07004). Truncation has a direction,
towards zero, so the error grows with the number of steps, and faster than rounding's would.

This is a model in numpy of `--step` products at a time and `--extra-bits` beyond the 24 of float32,
for random hidden states and weights in bfloat16. 16 and 2 come closest to what one H200 measured on
such numbers: a largest error of a log-probability of 2.5e-5 at hidden 4,096 and 4.5e-6 at 896.
"""

import argparse
import sys
from dataclasses import dataclass
from typing import Self

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

Array = NDArray[np.float64]
SIGNIFICAND = 24  # bits of a float32
BLOCKS = (2048, 1024, 512, 256)


@dataclass(frozen=True)
class TensorCore:
    """`step` products are added to the accumulator at once, with `extra_bits` beyond float32's."""

    step: int = 16
    extra_bits: int = 2

    def add(self, total: Array, products: Array) -> Array:
        """Return total [n] plus the sum of products [n, step], truncated on the way and at the end.

        Both hold numbers whose sum float64 has exactly.
        """
        addends = np.concatenate([total[:, None], products], axis=1)
        quantum = _quantum(np.abs(addends).max(axis=1), SIGNIFICAND + self.extra_bits)
        whole = (np.trunc(addends / quantum[:, None]) * quantum[:, None]).sum(axis=1)
        quantum = _quantum(np.abs(whole), SIGNIFICAND)
        truncated: Array = np.trunc(whole / quantum) * quantum
        return truncated

    def dot(self, x: Array, y: Array, block: int | None = None) -> Array:
        """Return the products of the rows of x and y [n, depth], moved out after each `block`.

        As the fused kernel does it: the upper 16 bits of the float32 sum leave the accumulator.
        """
        depth = x.shape[1]
        kept, total = np.zeros(len(x), np.float32), np.zeros(len(x))
        for first in range(0, depth, block or depth):
            for low in range(first, min(first + (block or depth), depth), self.step):
                part = slice(low, low + self.step)
                total = self.add(total, x[:, part] * y[:, part])
            if block is not None:
                whole = kept + total.astype(np.float32)
                kept = _upper_half(whole)
                total = (whole - kept).astype(np.float64)
        return (kept + total.astype(np.float32)).astype(np.float64)


def _quantum(largest: Array, bits: int) -> Array:
    """Return the unit in the last place of numbers with that many bits of significand."""
    _, exponent = np.frexp(largest)
    quantum: Array = np.ldexp(1.0, exponent - bits)
    return quantum


def _upper_half(values: NDArray[np.float32]) -> NDArray[np.float32]:
    return (values.view(np.uint32) & np.uint32(0xFFFF0000)).view(np.float32)


def bfloat16(values: Array) -> Array:
    """Round to the nearest bfloat16, ties to even."""
    bits = values.astype(np.float32).view(np.uint32)
    rounded = bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))
    return _upper_half(rounded.view(np.float32)).astype(np.float64)


@dataclass(frozen=True)
class Sample:
    """A target's and some other columns' factors for each of n rows: [n, columns, depth] each."""

    hidden: Array
    weight: Array

    @classmethod
    def random(cls, rows: int, columns: int, depth: int) -> Self:
        """Draw hidden states of unit variance, and weights for logits of standard deviation 1.3."""
        generator = np.random.default_rng(0)
        hidden = bfloat16(generator.standard_normal((rows, 1, depth)))
        weight = bfloat16(generator.standard_normal((rows, columns, depth)) * 1.28 / depth**0.5)
        return cls(np.broadcast_to(hidden, weight.shape), weight)

    def errors(self, core: TensorCore, block: int | None) -> Array:
        """Return each row's error of a log-probability: its target's less the log-sum-exp's.

        The first column is the target. A log-sum-exp moves by the mean error of all logits, by
        their probabilities, for which the sample's other columns stand.
        """
        rows, columns, depth = self.weight.shape
        x, y = (a.reshape(-1, depth) for a in (self.hidden, self.weight))
        exact = (x * y).sum(axis=1)
        error = (core.dot(x, y, block) - exact).reshape(rows, columns)
        probability = np.exp(exact.reshape(rows, columns)[:, 1:])
        log_sum_error = (probability * error[:, 1:]).sum() / probability.sum()
        errors: Array = error[:, 0] - log_sum_error
        return errors


def parse_arguments() -> argparse.Namespace:
    """Return the sizes and the core."""
    parser = argparse.ArgumentParser(description="Model how tensor cores add up.")
    parser.add_argument("--hidden", type=int, default=4096)
    parser.add_argument("--rows", type=int, default=256)
    parser.add_argument("--columns", type=int, default=49, help="of each row, its target included")
    parser.add_argument("--step", type=int, default=TensorCore.step)
    parser.add_argument("--extra-bits", type=int, default=TensorCore.extra_bits)
    return parser.parse_args()


def main() -> int:
    """Print the error for each depth of block."""
    arguments = parse_arguments()
    core = TensorCore(arguments.step, arguments.extra_bits)
    sample = Sample.random(arguments.rows, arguments.columns, arguments.hidden)
    table = Table("depth of a block", "largest error, nat", "mean")
    for block in (None, *(b for b in BLOCKS if b < arguments.hidden)):
        errors = np.abs(sample.errors(core, block))
        table.add_row(f"{block or 'one chain'}", f"{errors.max():.1e}", f"{errors.mean():.1e}")
    Console().print(table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
