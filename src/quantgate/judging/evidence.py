"""Where two measurements differ most: tokens in their text, strata, labels, positions."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from quantgate.formats.kernels import explained
from quantgate.judging.verdict import KLD_DECADES, Profile, WorstToken
from quantgate.subject.probe import Probe, passage
from quantgate.subject.task import is_classifier

if TYPE_CHECKING:
    from quantgate.measuring.divergence import Divergence
    from quantgate.measuring.measurement import Measurement
    from quantgate.subject.probe import Probe

WORST_TOKENS, WORST_LINES = 10, 5
POSITION_BINS = 32
CONFIDENCE_BUCKETS = (0.5, 0.95)
POSITION_BUCKETS = (64, 256, 512)


def profile_of(a: Measurement, b: Measurement, probe: Probe) -> Profile:
    """Return the ten worst values in their texts, omitting equal ones, and |Δ| by position."""
    delta = _size_of_difference(a, b, probe)
    columns, sizes = delta.argmax(axis=1), delta.max(axis=1)
    worst = []
    for row in np.argsort(-sizes, kind="stable")[:WORST_TOKENS].tolist():
        if not sizes[row]:
            break
        column = int(columns[row])
        ours, theirs = (float(m.values.reshape(probe.scored, -1)[row, column]) for m in (a, b))
        named = _column(column, probe) if a.values.ndim > 1 else ""
        place = f"{probe.documents[row]}[{probe.positions[row]}]"
        worst.append(WorstToken(place, passage(probe, row), named, ours, theirs))
    return Profile(tuple(_by_position(delta, probe)), tuple(worst))


def _by_position(delta: NDArray[np.float64], probe: Probe) -> Iterator[tuple[int, float, float]]:
    last = int(probe.positions.max())
    width = max(1, -(-(last + 1) // POSITION_BINS))
    bins = probe.positions // width
    for index in np.unique(bins).tolist():
        there = delta[bins == index]
        yield index * width, float(there.mean()), float(there.max())


def kld_decades(found: Divergence) -> tuple[int, ...]:
    """Return how many tokens have a KL divergence in each decade of `KLD_DECADES`."""
    first, last = KLD_DECADES
    with np.errstate(divide="ignore"):
        decades = np.floor(np.log10(np.nan_to_num(found.kld, nan=np.inf)))
    places = np.clip(decades, first, last).astype(int) - first
    return tuple(np.bincount(places, minlength=last - first + 1).tolist())


def where_they_differ(a: Measurement, b: Measurement, probe: Probe, worst: Profile) -> list[str]:
    """Return lines for the worst values, with their texts, and for means by stratum and label."""
    delta = _size_of_difference(a, b, probe)
    lines = worst_lines(worst)
    by_stratum = (f"{s} {np.mean(delta[probe.strata == s]):.3g}" for s in _unique(probe.strata))
    lines.append(f"mean |Δ|   {', '.join(by_stratum)}")
    if is_classifier(probe.task):
        by_label = (f"{_column(i, probe)} {d:.3g}" for i, d in enumerate(delta.mean(axis=0)))
        lines.append(f"by label   {', '.join(by_label)}")
    return lines


def worst_lines(profile: Profile) -> list[str]:
    """Return a line for each of the worst tokens that a message shows."""
    return [f"worst      {token}" for token in profile.worst[:WORST_LINES]]


def _size_of_difference(a: Measurement, b: Measurement, probe: Probe) -> NDArray[np.float64]:
    """Return |Δ| [n, D], or [n, 1]; non-finite values become infinity."""
    delta = np.abs(a.values.astype(np.float64) - b.values).reshape(probe.scored, -1)
    return np.where(np.isfinite(delta), delta, np.inf)


def divergence_by_group(found: Divergence, probe: Probe) -> dict[str, float]:
    """Return the mean KLD by stratum, by position and by the base's confidence, in nat."""
    sure = np.digitize(found.confidence, CONFIDENCE_BUCKETS)
    names = [f"p < {CONFIDENCE_BUCKETS[0]}", *(f"p >= {p}" for p in CONFIDENCE_BUCKETS)]
    places = np.digitize(probe.positions, POSITION_BUCKETS)
    positions = [f"< {POSITION_BUCKETS[0]}", *(f">= {p}" for p in POSITION_BUCKETS)]
    groups = [
        *((f"stratum {s}", probe.strata == s) for s in _unique(probe.strata)),
        *((f"position {name}", places == i) for i, name in enumerate(positions)),
        *((f"base's {name}", sure == i) for i, name in enumerate(names)),
    ]
    return {f"KLD, {name}": float(found.kld[rows].mean()) for name, rows in groups if rows.any()}


def kernels_line(measured: Measurement) -> list[str]:
    """Return a line with the kernel of each kind of layer, if known.

    And one for each kernel that deviates from its format.
    """
    kernels = measured.provenance.kernels
    listed = ", ".join(f"{kind} {name}" for kind, name in kernels.items())
    said = [f"its rule   {sentence}" for sentence in explained(kernels.values())]
    return [f"kernels    {listed}", *said] if listed else []


def _column(index: int, probe: Probe) -> str:
    """Return the name of a column of raw outputs: its label, or its number."""
    return probe.labels[index] if index < len(probe.labels) else f"[{index}]"


def _unique(labels: NDArray[Any]) -> list[str]:
    return list(dict.fromkeys(labels.tolist()))
