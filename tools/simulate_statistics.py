"""Show by simulation that the statistics do what they say: false alarms, power, early stopping.

    python tools/simulate_statistics.py                 10,000 runs of each, about five minutes
    python tools/simulate_statistics.py --runs 500      fewer

A run draws a pair of measurements whose true mean difference is known. A false alarm is a bound
that misses it, of which there may be α, and as many more as chance has in that many runs.
"""

import argparse
import sys
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import track
from rich.table import Table

from quantgate.judging.stats import ALPHA, POWER, confidence_sequence, holm, paired_mean

DOCUMENTS, TOKENS = 60, 40
LABELS = np.repeat(np.arange(DOCUMENTS), TOKENS)
# Checks of one checkpoint that Holm's adjustment is over.
FAMILY = 6
# How far power may be from the nominal one: the MDE is of an estimated error.
POWER_TOLERANCE = 0.1
Draw = Callable[[np.random.Generator], NDArray[np.float64]]


def independent(rng: np.random.Generator) -> NDArray[np.float64]:
    """Independent normal differences [documents, tokens]."""
    return rng.normal(size=(DOCUMENTS, TOKENS))


def clustered(rng: np.random.Generator) -> NDArray[np.float64]:
    """Differences that a document's tokens share a part of."""
    return rng.normal(size=(DOCUMENTS, 1)) + rng.standard_t(4, size=(DOCUMENTS, TOKENS))


def heavy_tailed(rng: np.random.Generator) -> NDArray[np.float64]:
    """Student's t with 3 degrees of freedom, documents of very different scales."""
    scale = np.exp(rng.normal(size=(DOCUMENTS, 1)))
    return scale * rng.standard_t(3, size=(DOCUMENTS, TOKENS))


def autocorrelated(rng: np.random.Generator) -> NDArray[np.float64]:
    """Each difference keeps 0.7 of the one before it."""
    noise = rng.normal(size=(DOCUMENTS, TOKENS))
    found = np.zeros_like(noise)
    for i in range(TOKENS):
        found[:, i] = noise[:, i] + (0.7 * found[:, i - 1] if i else 0)
    return found


DRAWS: dict[str, Draw] = {
    "independent": independent,
    "clustered": clustered,
    "heavy-tailed": heavy_tailed,
    "autocorrelated": autocorrelated,
}


@dataclass(frozen=True)
class Rates:
    """How often something happened in simulated runs of one kind of data."""

    upper_missed: float
    """The true mean was above its one-sided upper bound: nominally α."""
    lower_missed: float
    sequence_missed: float
    """It was, after any document at all, above the confidence sequence's: nominally α at most."""
    found_at_mde: float
    """A shift of the minimum detectable effect was found: nominally `POWER`."""
    family_alarm: float
    """Of several checks without any effect, Holm left one below α: nominally α at most."""


def simulate(draw: Draw, runs: int, seed: int = 0) -> Rates:
    """Return the rates of `runs` runs of one kind of data, whose true mean is 0."""
    rng = np.random.default_rng(seed)
    upper = lower = sequence = family = found = 0
    pilot = [paired_mean(draw(rng).ravel(), LABELS) for _ in range(200)]
    effect = float(np.mean([one.minimum_detectable_effect() for one in pilot]))
    p_values: list[float] = []
    for _ in range(runs):
        d = draw(rng)
        mean = paired_mean(d.ravel(), LABELS)
        below, above = mean.bounds()
        upper += above < 0
        lower += below > 0
        sequence += bool((confidence_sequence(d.mean(axis=1), SIZES)[1] < 0).any())
        found += below + effect > 0
        p_values.append(mean.p_above(0.0))
        if len(p_values) == FAMILY:
            family += min(holm(p_values)) < ALPHA
            p_values = []
    return Rates(
        upper / runs, lower / runs, sequence / runs, found / runs, family / (runs // FAMILY)
    )


SIZES = np.full(DOCUMENTS, TOKENS)


def problems(rates: Rates, runs: int) -> list[str]:
    """Return what is not as it is said to be, beyond the error of the simulation itself."""
    from scipy.stats import binom

    most = binom.ppf(0.999, runs, ALPHA) / runs
    most_families = binom.ppf(0.999, runs // FAMILY, ALPHA) / (runs // FAMILY)
    found = {
        "upper bound": (rates.upper_missed, most),
        "lower bound": (rates.lower_missed, most),
        "confidence sequence": (rates.sequence_missed, most),
        "Holm": (rates.family_alarm, most_families),
    }
    wrong = [
        f"{name}: {rate:.4f} > {limit:.4f}" for name, (rate, limit) in found.items() if rate > limit
    ]
    if abs(rates.found_at_mde - POWER) > POWER_TOLERANCE * POWER:
        wrong.append(f"power at the MDE: {rates.found_at_mde:.3f}, not {POWER}")
    return wrong


def main() -> int:
    """Simulate every kind of data and print the rates; 1 if one is not what it should be."""
    parser = argparse.ArgumentParser(description="Prove the statistics by simulation.")
    parser.add_argument("--runs", type=int, default=10_000)
    runs = parser.parse_args().runs
    rows = Table(box=None, pad_edge=False, header_style="bold")
    headings = ("upper bound", "lower bound", "sequence", "Holm", "power at MDE")
    for heading in ("data", *headings):
        rows.add_column(heading, justify="left" if heading == "data" else "right")
    wrong = []
    for name, draw in track(DRAWS.items(), f"{runs:,} runs each", total=len(DRAWS)):
        r = simulate(draw, runs)
        cells = (r.upper_missed, r.lower_missed, r.sequence_missed, r.family_alarm, r.found_at_mde)
        rows.add_row(name, *(f"{cell:.4f}" for cell in cells))
        wrong += [f"{name}: {problem}" for problem in problems(r, runs)]
    Console().print(rows)
    for problem in wrong:
        print(f"error: {problem}", file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
