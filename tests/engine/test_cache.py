"""What is measured once for a built checkpoint, and found again."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from quantgate.measuring import session
from quantgate.measuring.cache import DiskCache
from quantgate.measuring.case import Case
from quantgate.measuring.lab import Lab
from quantgate.measuring.ledger import Ledger
from quantgate.measuring.measurement import Measurement, Provenance
from quantgate.measuring.streamed_model import StreamedModel
from quantgate.subject.checkpoint import Checkpoint, EngineSettings
from quantgate.subject.probe import Probe

# A checkpoint's reference depends on the kernels that serve it, so its engine is started first.
EAGER = EngineSettings(enforce_eager=True, kv_cache_memory_bytes=1 << 27)


def quiet(_: str) -> None:
    pass


def case(checkpoint: Checkpoint, dtype: str, directory: Path, probe: Probe) -> Case:
    """A checkpoint's case in a run of its own, whose cache is in a directory."""
    lab = Lab(lambda *_: probe, Ledger(quiet, DiskCache(directory)))
    return Case.of(checkpoint, dtype, lab)


@pytest.fixture(scope="module")
def two(probe: Probe) -> Probe:
    """Two windows in the embedded checkpoint's own token ids."""
    return replace(probe, windows=probe.windows[:2])


def test_a_warm_cache_does_no_forward_pass(
    quantized: Path, two: Probe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = Checkpoint(id="x", source=str(quantized), engine=EAGER)
    cold = case(checkpoint, "float32", tmp_path, two).exact
    monkeypatch.setattr(StreamedModel, "__init__", None)
    warm = case(checkpoint, "float32", tmp_path, two).exact
    assert warm.logprob.tobytes() == cold.logprob.tobytes()
    assert warm.top1.tobytes() == cold.top1.tobytes()
    assert warm.hidden is not None
    assert cold.hidden is not None
    assert warm.hidden.tobytes() == cold.hidden.tobytes()
    assert warm.provenance == cold.provenance
    with pytest.raises(TypeError):  # another dtype is another entry
        case(checkpoint, "float64", tmp_path, two).reference("float64")


def test_a_damaged_entry_is_said_to_be_and_computed_anew(
    quantized: Path, two: Probe, tmp_path: Path
) -> None:
    checkpoint = Checkpoint(id="x", source=str(quantized), engine=EAGER)
    cold = case(checkpoint, "float32", tmp_path, two).exact
    (entry,) = tmp_path.glob("*.safetensors")
    content = bytearray(entry.read_bytes())
    content[-5] ^= 1
    entry.write_bytes(content)
    again = case(checkpoint, "float32", tmp_path, two)
    assert again.exact.logprob.tobytes() == cold.logprob.tobytes()
    assert again.lab.ledger.notes == [f"{entry}: not what was written; it was computed anew"]
    assert DiskCache(tmp_path).read(json.loads(_key_of(entry))) is not None


def _key_of(entry: Path) -> str:
    from safetensors import safe_open

    with safe_open(entry, framework="numpy") as stream:
        key: str = stream.metadata()["key"]
        return key


def test_a_base_is_served_once_for_all_runs(
    root: Path, two: Probe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A base's engine is remembered on disk, a checkpoint's own never is."""
    served: list[str] = []

    def measure(directory: Path, probe: Probe, *, dtype: str, **_: Any) -> tuple[Measurement, None]:
        served.append(directory.name)
        provenance = Provenance("engine", "cpu", "cpu", dtype, {"mlp": "K"}, ("K",))
        scores = np.linspace(-3, -1, probe.scored, dtype=np.float32)
        return Measurement(scores, np.zeros(probe.scored, np.int32), provenance), None

    monkeypatch.setattr(session, "measure", measure)
    checkpoint = Checkpoint(
        id="x",
        source=str(root / "build" / "tiny-llama-w4a16"),
        base=str(root / "fixtures" / "tiny" / "llama"),
    )
    base = checkpoint.base_checkpoint
    assert base is not None
    taken = []
    for _ in range(2):
        ours = case(checkpoint, "float32", tmp_path, two)
        assert ours.engine.provenance
        taken.append(replace(ours, checkpoint=base).engine)
    assert served == ["tiny-llama-w4a16", "llama", "tiny-llama-w4a16"]
    assert taken[0].provenance == taken[1].provenance
    assert taken[0].logprob.tobytes() == taken[1].logprob.tobytes()
    # Under other settings it is another measurement.
    other = replace(base, engine=EngineSettings(max_num_batched_tokens=64))
    _ = case(other, "float32", tmp_path, two).engine
    assert served[-1] == "llama"


def test_what_another_process_measured_meanwhile_is_not_measured_again(
    quantized: Path, two: Probe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = Checkpoint(id="x", source=str(quantized), engine=EAGER)
    first = case(checkpoint, "float32", tmp_path, two).exact
    (entry,) = tmp_path.glob("*.safetensors")
    hidden = entry.rename(tmp_path / "elsewhere")
    alone = DiskCache.alone

    def finished_meanwhile(cache: DiskCache, key: Any, waiting: Any) -> Any:
        hidden.rename(entry)
        return alone(cache, key, waiting)

    monkeypatch.setattr(DiskCache, "alone", finished_meanwhile)
    monkeypatch.setattr(StreamedModel, "__init__", None)
    second = case(checkpoint, "float32", tmp_path, two).exact
    assert second.logprob.tobytes() == first.logprob.tobytes()
