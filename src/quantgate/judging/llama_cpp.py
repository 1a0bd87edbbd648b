"""llama.cpp's divergence statistics with their standard errors, by its names and formulas."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from quantgate.measuring.divergence import Divergence


@dataclass(frozen=True)
class Estimate:
    """A number and its ± as llama.cpp computes it, treating tokens as independent."""

    value: float
    error: float | None = None
    """None if llama.cpp gives none."""


PERCENTILES_OF_KLD = (99.9, 99.0, 95.0, 90.0, 10.0, 5.0, 1.0, 0.1)
PERCENTILES_OF_DELTA_P = (99.9, 99.0, 95.0, 90.0, 75.0, 25.0, 10.0, 5.0, 1.0, 0.1)


def llama_cpp_statistics(found: Divergence) -> dict[str, Estimate]:
    """Return what llama.cpp's `--kl-divergence` prints, by its names; Δp as a fraction of 1."""
    ours, theirs = -found.logprob, -found.logprob_base
    q, base = _mean(ours), _mean(theirs)
    covariance = float(np.mean(ours * theirs) - ours.mean() * theirs.mean()) / (len(ours) - 1)
    ratio = Estimate(
        q.value - base.value, _root(_error(q) ** 2 + _error(base) ** 2 - 2 * covariance)
    )
    ppl, ppl_base = _exponential(q), _exponential(base)
    difference = _root(
        _error(ppl) ** 2 + _error(ppl_base) ** 2 - 2 * ppl.value * ppl_base.value * covariance
    )
    spread = _error(q) * _error(base)
    statistics = {
        "Mean PPL(Q)": ppl,
        "Mean PPL(base)": ppl_base,
        "Cor(ln(PPL(Q)), ln(PPL(base)))": Estimate(covariance / spread if spread else 1.0),
        "Mean ln(PPL(Q)/PPL(base))": ratio,
        "Mean PPL(Q)/PPL(base)": _exponential(ratio),
        "Mean PPL(Q)-PPL(base)": Estimate(ppl.value - ppl_base.value, difference),
        "Mean KLD": _mean(found.kld),
        **_percentiles(found.kld, PERCENTILES_OF_KLD, "KLD"),
        "Mean Δp": _mean(found.delta_p),
        **_percentiles(found.delta_p, PERCENTILES_OF_DELTA_P, "Δp"),
        "RMS Δp": _rms(found.delta_p),
        "Same top p": _share(found.same_top),
    }
    return statistics


def _mean(values: NDArray[np.float64]) -> Estimate:
    # llama.cpp divides the variance by n, and again by n - 1 before taking the square root.
    return Estimate(float(values.mean()), float(np.sqrt(values.var() / (len(values) - 1))))


def _exponential(log: Estimate) -> Estimate:
    value = float(np.exp(log.value))
    return Estimate(value, value * _error(log))


def _rms(values: NDArray[np.float64]) -> Estimate:
    square = _mean(values**2)
    value = _root(square.value)
    return Estimate(value, 0.5 / value * _error(square) if value else 0.0)


def _share(values: NDArray[np.bool_]) -> Estimate:
    value = float(values.mean())
    return Estimate(value, _root(value * (1 - value) / (len(values) - 1)))


def _percentiles(
    values: NDArray[np.float64], percentiles: tuple[float, ...], name: str
) -> dict[str, Estimate]:
    found = {f"Maximum {name}": Estimate(float(values.max()))}
    for percent in percentiles:
        found[f"{percent:.1f}% {name}"] = Estimate(float(np.percentile(values, percent)))
        if percent == min(p for p in percentiles if p > 50):
            found[f"Median {name}"] = Estimate(float(np.median(values)))
    return {**found, f"Minimum {name}": Estimate(float(values.min()))}


def _error(estimate: Estimate) -> float:
    assert estimate.error is not None
    return estimate.error


def _root(value: float) -> float:
    return float(np.sqrt(max(0.0, value)))
