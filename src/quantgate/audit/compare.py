"""A weight's distance from its base's, beside that of plain rounding, some rows at a time."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from quantgate.audit.decode import Floats
    from quantgate.audit.dequantize import StoredWeight

Doubles = NDArray[np.float64]

# Elements of a block of rows: what fits a core's cache. Larger blocks take twice as long.
BLOCK = 1 << 17
# Columns whose error is pooled if a format has no groups.
GROUP = 128
# dB above which weights count as equal: quantized weights have 16-bit scales.
CEILING = 60.0


@dataclass(frozen=True)
class Likeness:
    """How a weight compares with its source, and how rounding to nearest would compare."""

    snr: float
    """Signal to noise in dB; infinite if they are equal."""
    nearest_snr: float
    ratio: float
    """The factor by which the weight is larger, by least squares."""
    nearest_ratio: float
    cosine: float
    worst: float
    """The largest error in a row's group, in dB above rounding's own there plus its average."""
    row: int
    """The row with that error."""
    coherence: float
    """The share of the error that a factor per row would explain: wrong scales."""
    coherence_of_groups: float
    """Likewise a factor per group of a row, less what it explains of random errors."""
    row_ratios: Doubles
    """The factor by which each row is larger than rounding's."""
    column_ratios: Doubles
    finite: bool
    ceiling: float
    """Signal to noise, in dB, above which weights count as equal."""

    @property
    def factor(self) -> float:
        """How much larger than rounding's the weight is."""
        return self.ratio / self.nearest_ratio

    @property
    def excess(self) -> float:
        """How far the error is above rounding's, in dB."""
        return min(self.nearest_snr, self.ceiling) - min(self.snr, self.ceiling)

    @property
    def snr_but_for_a_factor(self) -> float:
        """The signal to noise after dividing out a single factor, in dB."""
        rest = 1 - self.cosine**2
        return 10 * math.log10(self.cosine**2 / rest) if 0 < rest < 1 else math.inf


@dataclass(frozen=True)
class Sums:
    """Sums over blocks of rows for a weight d, its base w, and n, which is w rounded."""

    dw: Doubles
    nw: Doubles
    ww: Doubles
    dd: Doubles
    error: Doubles
    nearest_error: Doubles
    group_error: Doubles
    """[rows, groups], like the next."""
    nearest_group_error: Doubles
    by_groups: Doubles
    """The error that a factor per group explains."""


def likeness(  # noqa: PLR0913  how two weights are compared: all but three are keyword-only
    weight: StoredWeight,
    base: StoredWeight,
    nearest: Callable[[Floats], Floats],
    *,
    height: int = 1,
    group_size: int = GROUP,
    ceiling: float = CEILING,
    rows: Doubles | None = None,
    columns: Doubles | None = None,
) -> Likeness:
    """Compare a weight with its base, after multiplying the base's rows and columns by factors."""
    by_row: list[Sums] = []
    of_columns = np.zeros((3, base.columns))
    step = max(1, BLOCK // base.columns // height) * height
    for first in range(0, base.rows, step):
        last = min(first + step, base.rows)
        d, w = weight.read(first, last), base.read(first, last)
        if columns is not None:
            w = w * columns.astype(np.float32)
        if rows is not None:
            w = w * rows[first:last, None].astype(np.float32)
        n = nearest(w)
        by_row.append(_sums(d, w, n, group_size))
        of_columns += [_dot(a, b, 0) for a, b in ((d, w), (n, w), (w, w))]
    total = Sums(*(np.concatenate([getattr(s, f) for s in by_row]) for f in Sums.__annotations__))
    return _likeness(total, of_columns, ceiling, group_size)


def _sums(d: Floats, w: Floats, n: Floats, group_size: int) -> Sums:
    error, nearest_error = d - w, n - w
    pairs = (d, w), (n, w), (w, w), (error, error), (nearest_error, nearest_error)
    dw, nw, ww, ee, nn = (_by_group(a, b, group_size) for a, b in pairs)
    explained = np.divide(np.square(dw - nw), ww, out=np.zeros_like(ww), where=ww > 0)
    return Sums(
        dw.sum(axis=1),
        nw.sum(axis=1),
        ww.sum(axis=1),
        _dot(d, d),
        ee.sum(axis=1),
        nn.sum(axis=1),
        ee,
        nn,
        explained.sum(axis=1),
    )


def _by_group(a: Floats, b: Floats, size: int) -> Doubles:
    """Return sums of products [rows, groups]; the last group of columns may be smaller."""
    whole = a.shape[1] // size * size
    pieces = [x[:, :whole].reshape(len(x), -1, size) for x in (a, b)]
    sums: Doubles = np.einsum("ijk,ijk->ij", *pieces).astype(np.float64)
    if whole < a.shape[1]:
        sums = np.hstack([sums, _dot(a[:, whole:], b[:, whole:])[:, None]])
    return sums


def _dot(a: Floats, b: Floats, axis: int = 1) -> Doubles:
    """Return sums of products over an axis: a few thousand terms, for which float32 is enough."""
    sums: Doubles = np.einsum("ij,ij->i" if axis else "ij,ij->j", a, b).astype(np.float64)
    return sums


def _likeness(sums: Sums, of_columns: Doubles, ceiling: float, group_size: int) -> Likeness:
    ww, dd = float(sums.ww.sum()), float(sums.dd.sum())
    error, nearest_error = float(sums.error.sum()), float(sums.nearest_error.sum())
    # Add rounding's average to its error in the group: a group may round to itself by chance.
    average = (
        float(sums.nearest_group_error.mean()) + 10 ** (-ceiling / 10) * ww / sums.group_error.size
    )
    above = (sums.group_error + average) / (sums.nearest_group_error + average)
    worst = int(np.argmax(np.nan_to_num(above, nan=np.inf)))
    row_ratios = _ratios(sums.dw, sums.nw)
    coherent = float((np.square(row_ratios - 1) * sums.ww).sum())
    finite = bool(np.isfinite(sums.dd).all())
    return Likeness(
        _decibel(ww, error),
        _decibel(ww, nearest_error),
        _quotient(float(sums.dw.sum()), ww),
        _quotient(float(sums.nw.sum()), ww),
        _quotient(float(sums.dw.sum()), math.sqrt(ww * dd) if finite else 0.0),
        10 * math.log10(float(above.reshape(-1)[worst])) if finite else math.inf,
        worst // above.shape[1],
        coherent / error if error and finite else 0.0,
        # One factor explains one part in `group_size` of random errors, those of both weights.
        (float(sums.by_groups.sum()) - (error + nearest_error) / group_size) / error
        if error and finite
        else 0.0,
        row_ratios,
        _ratios(of_columns[0], of_columns[1]),
        finite,
        ceiling,
    )


def _decibel(signal: float, noise: float) -> float:
    if not math.isfinite(noise):
        return -math.inf
    return 10 * math.log10(signal / noise) if noise > 0 and signal > 0 else math.inf


def _quotient(a: float, b: float) -> float:
    return a / b if b > 0 and math.isfinite(a) else 1.0


def _ratios(a: Doubles, b: Doubles) -> Doubles:
    return np.divide(a, b, out=np.ones_like(a), where=np.abs(b) > 0)
