"""Windows in another order, and of mixed lengths."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from quantgate.measuring import reruns, session
from quantgate.measuring.measurement import Measurement, Provenance
from quantgate.subject.probe import Probe, Window
from quantgate.subject.windows import MIXED, mixed

PROVENANCE = Provenance("engine", "cpu", "cpu", "float32")


lengths = st.lists(st.integers(2, 9), min_size=1, max_size=40)


def probe_of(lengths: Sequence[int]) -> Probe:
    windows = [Window(f"d{i}", "s", 1, tuple(range(i, i + n)), "") for i, n in enumerate(lengths)]
    return Probe("p", 99, tuple(windows))


@given(lengths=lengths, seed=st.integers(0, 99), data=st.data())
def test_rows_come_back_in_the_probes_order(
    lengths: list[int], seed: int, data: st.DataObject
) -> None:
    """Whatever the batches: each row is known by its token's id."""
    probe = probe_of(lengths)
    order = np.random.default_rng(seed).permutation(len(lengths)).tolist()
    cut = data.draw(st.integers(0, len(order)))

    def serve(_llm: Any, part: Probe, provenance: Provenance) -> Measurement:
        ids = np.concatenate([window.ids[1:] for window in part.windows])
        return Measurement(ids.astype(np.float32), ids.astype(np.int32), provenance)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(session, "serve", serve)
        batches = [batch for batch in (order[:cut], order[cut:]) if batch]
        found = reruns.in_batches(None, probe, batches, PROVENANCE)
    expected = np.concatenate([window.ids[1:] for window in probe.windows])
    assert found.values.tolist() == found.top1.tolist() == expected.tolist()


@given(lengths=lengths)
def test_mixed_windows_are_of_all_lengths_and_know_their_rows(lengths: list[int]) -> None:
    probe = probe_of(lengths)
    part, rows = mixed(probe)
    assert 1 <= len(part.windows) <= MIXED
    sizes = [len(window.ids) for window in part.windows]
    assert {min(sizes), max(sizes)} == {min(lengths), max(lengths)}
    assert probe.documents[rows].tolist() == part.documents.tolist()
    assert probe.positions[rows].tolist() == part.positions.tolist()
