"""Measurements: what every source returns, so that a comparison never knows which two it holds."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

Announce = Callable[[str], None]
"""Tells a person what is measured now."""


@dataclass(frozen=True)
class Provenance:
    """Where a measurement comes from. Listed when two differ; not part of a golden's key."""

    source: str
    """"engine", "reference" or "golden"."""
    device: str
    """"cpu" or "cuda"."""
    platform: str
    """"cpu", "sm90", …"""
    dtype: str
    """"float32" or "bfloat16": what activations are computed in."""
    kernels: Mapping[str, str] = field(default_factory=dict)
    """Kernel that served each kind of layer, read from the loaded model."""
    emulated: tuple[str, ...] = ()
    """The kernels among them that are emulations."""
    versions: Mapping[str, str] = field(default_factory=dict)
    arithmetic: Mapping[str, str] = field(default_factory=dict)
    """What makes a machine round otherwise than another (`builds.arithmetic`); {} where nobody
    said."""
    repaired: tuple[str, ...] = ()
    """The heads that vLLM alone would have loaded wrong, and that a patch keeps whole."""


@dataclass(frozen=True)
class Measurement:
    """What a model gives for a probe's n scored tokens, in its order.

    Of a model that generates, log-probabilities; of one that pools, the raw outputs of each token,
    or of each text where that has one output.
    """

    values: NDArray[np.floating[Any]]
    """Natural-log probability of each scored token [n]; or logits before their activation, or
    embeddings before they are normalized [n, D]. float64 from a float64 reference only."""
    top1: NDArray[np.int32]
    """Most probable token, or label, at each position [n]."""
    provenance: Provenance
    hidden: NDArray[np.float32] | None = None
    """What the head was given for each scored token [n, H]: of a reference, but not in float64,
    and of an engine in the dtype that is served."""
    activated: NDArray[np.float32] | None = None
    """What a pooling request that asks for nothing gets [n, D]; of an engine only."""

    @property
    def nonfinite(self) -> int:
        """How many values are NaN or infinite."""
        return int(np.count_nonzero(~np.isfinite(self.values)))

    @property
    def logprob(self) -> NDArray[np.floating[Any]]:
        """The values of a model that generates."""
        return self.values

    @property
    def mean_nll(self) -> float:
        """Mean negative log-likelihood, nat per token."""
        return float(-np.mean(self.logprob, dtype=np.float64))

    @property
    def perplexity(self) -> float:
        """exp of `mean_nll`."""
        return float(np.exp(self.mean_nll))


def rows_of(measured: Measurement, rows: NDArray[np.int64]) -> Measurement:
    """Return the part of a measurement that is of some of its scored tokens [m]."""
    hidden = None if measured.hidden is None else measured.hidden[rows]
    return replace(
        measured,
        values=measured.values[rows],
        top1=measured.top1[rows],
        hidden=hidden,
        activated=None,
    )


def pooled(
    values: NDArray[np.floating[Any]],
    provenance: Provenance,
    activated: NDArray[np.float32] | None = None,
) -> Measurement:
    """Return the measurement of raw pooling outputs [n, D]."""
    best = values.argmax(axis=-1).astype(np.int32)
    return Measurement(values, best, provenance, activated=activated)


def difference(a: Measurement, b: Measurement) -> NDArray[np.float64]:
    """Return the values of one measurement less another's [n] or [n, D].

    Raises `ValueError` where they are of other shapes: that is a mistake of the caller's.
    """
    if a.values.shape != b.values.shape:
        raise ValueError(f"measurements of shapes {a.values.shape} and {b.values.shape}")
    return a.values.astype(np.float64) - b.values.astype(np.float64)


def largest_difference(a: Measurement, b: Measurement) -> float:
    """Return max |Δ| between two measurements; NaN where one is not finite."""
    return float(np.abs(difference(a, b)).max())  # NaN wins, and exceeds every allowance


def mean_absolute_difference(a: Measurement, b: Measurement) -> float:
    """Return mean |Δ| between two measurements."""
    return float(np.mean(np.abs(difference(a, b))))
