"""Which experts the engine chose, beside the reference and the base, and which none reached."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from quantgate.subject.task import GENERATE

if TYPE_CHECKING:
    from quantgate.measuring.measurement import Measurement
    from quantgate.measuring.replay import Replay
    from quantgate.subject.probe import Probe

# Layers with more experts than this show their range, not each count.
LISTED = 16
UNREACHED_SHOWN = 5


@dataclass(frozen=True)
class Routing:
    """How a mixture of experts was routed, for a verdict."""

    sentence: str
    """What follows a verdict's own sentence; "" for a dense model."""
    lines: tuple[str, ...] = ()
    """How many tokens of the probe reached each expert, a line for each layer."""


def routing_of(
    replay: Replay, probe: Probe, own: Measurement, base: Measurement | None = None
) -> Routing:
    """Return how the engine routed the replayed windows, and the reference the whole probe.

    `own` and `base` are free-running references of the checkpoint and of its base.
    """
    if not replay.choices or own.experts is None:
        return Routing("")
    rows = _rows(replay.windows, probe)
    engine = np.stack([choice.ids for choice in replay.choices])
    differ = _share(engine, own.experts[:, rows])
    shares = [f"{differ:.2%} differ from the free-running reference's"]
    if base is not None and base.experts is not None:
        if base.experts.shape == own.experts.shape:
            shares.append(f"{_share(engine, base.experts[:, rows]):.2%} from the base's")
        else:
            shares.append("the base has other experts")
    counts = [
        np.bincount(ids.ravel(), minlength=choice.experts)
        for choice, ids in zip(replay.choices, own.experts, strict=True)
    ]
    names = [choice.name for choice in replay.choices]
    return Routing(
        f"; of the engine's choices of experts {' and '.join(shares)}{_unreached(names, counts)}",
        tuple(_line(name, count) for name, count in zip(names, counts, strict=True)),
    )


def _rows(windows: tuple[int, ...], probe: Probe) -> NDArray[np.int64]:
    """Return the places of some windows' computed tokens among all of the probe's."""
    last = 1 if probe.task == GENERATE else 0  # a window's last token is not computed
    lengths = [len(window.ids) - last for window in probe.windows]
    starts = np.concatenate([[0], np.cumsum(lengths)])
    return np.concatenate([np.arange(starts[w], starts[w] + lengths[w]) for w in windows])


def _share(ids: NDArray[np.int32], others: NDArray[np.int32]) -> float:
    """Return the share of tokens [layers, tokens, k] that have other experts, in any order."""
    return float((np.sort(ids, axis=2) != np.sort(others, axis=2)).any(axis=2).mean())


def _unreached(names: list[str], counts: list[NDArray[np.int64]]) -> str:
    """Name the experts that no token of the probe reached, of which a check says nothing."""
    missed = [
        f"{name}.{expert}"
        for name, count in zip(names, counts, strict=True)
        for expert in np.flatnonzero(count == 0)
    ]
    if not missed:
        return f"; each expert is reached by {min(count.min() for count in counts)} tokens or more"
    more = f" and {len(missed) - UNREACHED_SHOWN} more" if len(missed) > UNREACHED_SHOWN else ""
    return (
        f"; NO token of the probe reaches {', '.join(missed[:UNREACHED_SHOWN])}{more}, so nothing "
        "is known of them"
    )


def _line(name: str, count: NDArray[np.int64]) -> str:
    listed = ", ".join(map(str, count))
    if len(count) > LISTED:
        listed = f"{count.min()} to {count.max()}, {np.count_nonzero(count == 0)} of none"
    return f"routing    {name}: tokens of the probe by expert: {listed}"
