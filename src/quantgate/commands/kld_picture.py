"""The picture of a comparison: KL divergence by position and by the base's confidence, as SVG."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT, MARGIN = 640, 220, 56
GAP = 4
TICKS = 4


@dataclass(frozen=True)
class Bin:
    """The scored tokens of a range of positions, or of the base's confidence."""

    start: float
    end: float
    tokens: int
    kld: float
    """Their mean KL divergence, nat."""
    error: float | None
    """Its standard error over tokens; None for a single token."""
    same_top: float
    """The part of them whose most probable token is the base's."""


def picture(title: str, by_position: Sequence[Bin], by_confidence: Sequence[Bin]) -> str:
    """Return an SVG of two bar charts, one above the other; bars have their figures as tooltips."""
    charts = (
        ("position in the window", by_position),
        ("largest probability of the base", by_confidence),
    )
    tall = len(charts) * (HEIGHT + 2 * MARGIN)
    drawn = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH + 2 * MARGIN} {tall + 24}" '
        'font-family="sans-serif" font-size="12">',
        '<rect width="100%" height="100%" fill="white"/>',
        f'<text x="{MARGIN}" y="20" font-weight="bold">{escape(title)}</text>',
    ]
    for number, (axis, bins) in enumerate(charts):
        top = 24 + MARGIN + number * (HEIGHT + 2 * MARGIN)
        drawn.append(f'<g transform="translate({MARGIN} {top})">{_chart(axis, bins)}</g>')
    return "\n".join([*drawn, "</svg>", ""])


def _chart(axis: str, bins: Sequence[Bin]) -> str:
    top = max(b.kld + (b.error or 0.0) for b in bins) or 1.0
    step = WIDTH / len(bins)
    parts = [f'<text x="0" y="-10">mean KLD, nat, by {escape(axis)}; lines are ± 1 SE</text>']
    for tick in range(TICKS + 1):
        y = HEIGHT * (1 - tick / TICKS)
        parts.append(f'<path d="M0 {y:.1f}h{WIDTH}" stroke="#ddd"/>')
        parts.append(
            f'<text x="-4" y="{y + 4:.1f}" text-anchor="end">{top * tick / TICKS:.2g}</text>'
        )
    for place, one in enumerate(bins):
        parts.append(_bar(one, place * step, step - GAP, top))
    return "".join(parts)


def _bar(one: Bin, x: float, width: float, top: float) -> str:
    tall = HEIGHT * one.kld / top
    middle = x + width / 2
    said = (
        f"{one.start:.4g} to {one.end:.4g}: {one.kld:.4g} nat, {one.tokens} tokens, "
        f"same top {one.same_top:.1%}"
    )
    whisker = ""
    if one.error:
        low, high = (HEIGHT - HEIGHT * (one.kld + s * one.error) / top for s in (-1, 1))
        whisker = f'<path d="M{middle:.1f} {low:.1f}V{high:.1f}" stroke="black"/>'
    return (
        f'<g><title>{escape(said)}</title><rect x="{x:.1f}" y="{HEIGHT - tall:.1f}" '
        f'width="{width:.1f}" height="{tall:.1f}" fill="#4878a8"/>{whisker}'
        f'<text x="{middle:.1f}" y="{HEIGHT + 14}" text-anchor="middle" font-size="10">'
        f"{one.start:.3g}</text></g>"
    )
