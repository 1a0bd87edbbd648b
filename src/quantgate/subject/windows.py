"""Choices among a probe's windows: a part that is served again, a part that is captured."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from quantgate.errors import BadInput
from quantgate.subject.probe import Probe
from quantgate.subject.task import GENERATE
from quantgate.subject.tier import Tier

# How many windows show whether a way of serving matters, and of how many tokens together: they are
# served three and a half times in each dtype, and one request or chunk that gets another's rows or
# blocks is off by orders of magnitude at each of them.
MIXED, MIXED_TOKENS = 16, 1600

# Tokens whose inputs and outputs are captured for replay: half a GiB for a model of 8 billion
# parameters in bfloat16, 4 GiB for one of 70.
REPLAY_TOKENS = 512

# Windows of more tokens than this are long contexts: a check of their own scores them.
LONG_CONTEXT = 2048

# What the quick tier scores: enough for a cost of a few hundredths of a nat to show.
QUICK_TOKENS = 2000

Rows = NDArray[np.int64]


def mixed(probe: Probe, *, whole: bool = False) -> tuple[Probe, Rows]:
    """Return a few of a probe's windows, of evenly spaced ranks by length, and their rows [m].

    All of them if the `whole` probe is wanted.

    The two longest are among them: each fills blocks of the prefix cache, and could get those of
    the other.
    """
    if whole:
        return probe, np.arange(probe.scored)
    sizes = [len(window.ids) for window in probe.windows]
    by_length = sorted(range(len(sizes)), key=lambda i: sizes[i])
    others, longest = by_length[:-2], by_length[-2:]
    chosen = longest
    for count in range(min(MIXED - 2, len(others)), 0, -1):
        ranks = np.linspace(0, len(others) - 1, count).astype(int)
        chosen = [*(others[rank] for rank in ranks), *longest]
        if sum(sizes[i] for i in chosen) <= MIXED_TOKENS:
            break
    return part_of(probe, sorted(chosen)), rows_of(probe, sorted(chosen))


def for_tier(probe: Probe, tier: Tier) -> Probe:
    """Return the part of a probe that a tier scores: no long context, and in the quick tier few
    tokens, of windows from every stratum in turn."""
    short = [i for i, window in enumerate(probe.windows) if len(window.ids) <= LONG_CONTEXT]
    if tier == "quick" and probe.task == GENERATE:
        short = _first_of_each_stratum(probe, short)
    if probe.windows and not short:
        raise BadInput(
            f"probe '{probe.name}': each of its windows has more than {LONG_CONTEXT:,} tokens; add "
            "shorter ones, which every other check scores."
        )
    return probe if len(short) == len(probe.windows) else part_of(probe, short)


def _first_of_each_stratum(probe: Probe, windows: Sequence[int]) -> list[int]:
    places: Counter[str] = Counter()
    in_turn = []
    for index in windows:
        stratum = probe.windows[index].stratum
        in_turn.append((places[stratum], index))
        places[stratum] += 1
    chosen: list[int] = []
    tokens = 0
    for _, index in sorted(in_turn):
        tokens += len(probe.windows[index].ids)
        if chosen and tokens > QUICK_TOKENS:
            break
        chosen.append(index)
    return sorted(chosen)


def long_contexts(probe: Probe, most: int | None) -> Probe | None:
    """Return a probe of the long contexts only, of `most` tokens each; None if it has none."""
    sizes = [len(window.ids) for window in probe.windows]
    long = [i for i, n in enumerate(sizes) if n > LONG_CONTEXT and (most is None or n <= most)]
    return part_of(probe, long) if long else None


def part_of(probe: Probe, windows: Sequence[int]) -> Probe:
    """Return a probe of some of its windows only."""
    return dataclasses.replace(probe, windows=tuple(probe.windows[i] for i in windows))


def rows_of(probe: Probe, windows: Sequence[int]) -> Rows:
    """Return which of a probe's scored tokens are those of some windows [m], window by window."""
    starts = np.cumsum([0, *(window.scored for window in probe.windows)])
    return np.concatenate([np.arange(starts[i], starts[i + 1]) for i in windows])


def replay_windows(probe: Probe) -> list[int]:
    """Return the windows to capture, while they are few tokens: short ones, of every stratum."""
    by_length = sorted(range(len(probe.windows)), key=lambda i: len(probe.windows[i].ids))
    seen: set[str] = set()
    first: list[int] = []
    others: list[int] = []
    for index in by_length:
        stratum = probe.windows[index].stratum
        (others if stratum in seen else first).append(index)
        seen.add(stratum)
    chosen: list[int] = []
    tokens = 0
    for index in [*first, *others]:
        tokens += len(probe.windows[index].ids)
        if chosen and tokens > REPLAY_TOKENS:
            break
        chosen.append(index)
    return chosen
