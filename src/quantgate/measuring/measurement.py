"""Measurements: what every source returns, so that a comparison never knows which two it holds."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

Announce = Callable[[str], None]
"""Tells the user what is being measured."""


@dataclass(frozen=True)
class Provenance:
    """Where a measurement comes from. Shown when two differ; not part of a golden's key."""

    source: str
    """"engine", "reference" or "golden"."""
    device: str
    """"cpu" or "cuda"."""
    platform: str
    """"cpu", "sm90", …"""
    dtype: str
    """"float32" or "bfloat16": the dtype of activations."""
    kernels: Mapping[str, str] = field(default_factory=dict)
    """The kernel that served each kind of layer, read from the loaded model."""
    emulated: tuple[str, ...] = ()
    """The kernels among them that are emulations."""
    versions: Mapping[str, str] = field(default_factory=dict)
    arithmetic: Mapping[str, str] = field(default_factory=dict)
    """The properties that make machines round differently (`builds.arithmetic`); {} if not
    recorded."""
    repaired: tuple[str, ...] = ()
    """The heads that unpatched vLLM would have loaded wrong, and that a patch repairs."""


@dataclass(frozen=True)
class Measurement:
    """What a model gives for a probe's n scored tokens, in the probe's order.

    A generative model gives log-probabilities; a pooling model gives raw outputs per token, or per
    text if a text has one output.
    """

    values: NDArray[np.floating[Any]]
    """Natural-log probability of each scored token [n]; or logits before activation, or embeddings
    before normalization [n, D]. float64 only from a float64 reference."""
    top1: NDArray[np.int32]
    """Most probable token, or label, at each position [n]."""
    provenance: Provenance
    hidden: NDArray[np.float32] | None = None
    """The head's input for each scored token [n, H]: from a reference, except in float64, and from
    an engine in the serving dtype."""
    activated: NDArray[np.float32] | None = None
    """What a pooling request with default parameters returns [n, D]; from an engine only."""
    experts: NDArray[np.int32] | None = None
    """The experts that each layer with experts chooses for each computed token [layers, tokens, k];
    from a reference of a mixture of experts only."""

    @property
    def nonfinite(self) -> int:
        """How many values are NaN or infinite."""
        return int(np.count_nonzero(~np.isfinite(self.values)))

    @property
    def logprob(self) -> NDArray[np.floating[Any]]:
        """The values of a generative model."""
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
    """Return the part of a measurement at some of its scored tokens [m]."""
    hidden = None if measured.hidden is None else measured.hidden[rows]
    return replace(
        measured,
        values=measured.values[rows],
        top1=measured.top1[rows],
        hidden=hidden,
        activated=None,
        experts=None,
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
    """Return the values of `a` minus those of `b`, [n] or [n, D].

    Raises `ValueError` if their shapes differ, which is a mistake of the caller's.
    """
    if a.values.shape != b.values.shape:
        raise ValueError(f"measurements of shapes {a.values.shape} and {b.values.shape}")
    return a.values.astype(np.float64) - b.values.astype(np.float64)


def largest_difference(a: Measurement, b: Measurement) -> float:
    """Return max |Δ| between two measurements; NaN if either is not finite."""
    return float(np.abs(difference(a, b)).max())  # NaN propagates, and fails every limit


def mean_absolute_difference(a: Measurement, b: Measurement) -> float:
    """Return mean |Δ| between two measurements."""
    return float(np.mean(np.abs(difference(a, b))))
