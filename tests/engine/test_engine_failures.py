"""No engine starts on a lost device, or while another one is alive."""

from pathlib import Path
from typing import Any

import pytest

from quantgate.measuring import engine, engine_failure, session
from quantgate.measuring.engine_failure import LostDevice
from quantgate.subject.probe import Probe


def test_no_engine_starts_on_a_lost_device(
    monkeypatch: pytest.MonkeyPatch, quantized: Path
) -> None:
    from quantgate.measuring.engine import running_engine
    from quantgate.subject.checkpoint import EngineSettings

    monkeypatch.setattr(engine_failure, "_lost", "not served, because")
    with (
        pytest.raises(LostDevice, match="not served, because"),
        running_engine(quantized, settings=EngineSettings(), dtype="float32"),
    ):
        pass


def test_no_engine_is_alive_when_the_next_one_starts(
    monkeypatch: pytest.MonkeyPatch, quantized: Path, probe: Probe, tmp_path: Path
) -> None:
    """On a GPU the first one's memory would be missing to the second. Plumbing: made-up engines."""
    import gc
    import weakref
    from collections.abc import Iterator
    from contextlib import contextmanager

    from quantgate.subject.checkpoint import EngineSettings

    class MadeUp:
        pass

    started: list[weakref.ref[MadeUp]] = []

    @contextmanager
    def running_engine(directory: Path, **_: Any) -> Iterator[MadeUp]:
        gc.collect()
        assert all(reference() is None for reference in started)
        llm = MadeUp()
        started.append(weakref.ref(llm))
        yield llm

    monkeypatch.setattr(engine, "running_engine", running_engine)
    monkeypatch.setattr(session, "_measured", lambda *_: "measured")
    monkeypatch.setattr(session, "capture", lambda *_: "captured")
    settings = EngineSettings(enforce_eager=False)
    found: tuple[object, object] = session.measure(
        quantized, probe, settings=settings, dtype="bfloat16", announce=print, capture_into=tmp_path
    )
    assert found == ("measured", "captured")
    assert len(started) == 2
