"""Goldens: what is stored, and what damage is noticed."""

import dataclasses
import json
import re
from pathlib import Path

import numpy as np
import pytest
from damage import sealed
from hypothesis import given, settings
from hypothesis import strategies as st

from quantgate.atomic import write_atomically
from quantgate.errors import BadInput
from quantgate.judging.golden import (
    SKETCH,
    Golden,
    GoldenKey,
    as_stored,
    from_json,
    to_json,
)
from quantgate.measuring.measurement import Measurement, Provenance, pooled
from quantgate.subject.probe import Probe, Window

PROVENANCE = Provenance("engine", "cpu", "cpu", "float32", {"lm_head": "X"}, ("X",), {"torch": "2"})


def probe_of(lengths: list[int]) -> Probe:
    """Windows of these lengths; the same document holds every third of them."""
    return Probe(
        "p",
        50,
        tuple(Window(f"d{i % 3}", "s", 1, tuple(range(n)), "") for i, n in enumerate(lengths)),
    )


def golden_of(probe: Probe, seed: int = 0) -> Golden:
    generator = np.random.default_rng(seed)
    measurement = Measurement(
        generator.normal(size=probe.scored).astype(np.float32),
        generator.integers(0, 50, probe.scored).astype(np.int32),
        PROVENANCE,
    )
    key = GoldenKey("0" * 64, probe.sha256, "cpu", "float32", "auto", "portable")
    return Golden(key, measurement, ({"date": "2026-01-01", "reason": "r"},))


@given(lengths=st.lists(st.integers(2, 9), min_size=1, max_size=8), seed=st.integers(0, 99))
@settings(deadline=None)
def test_a_golden_reads_back_bit_for_bit(lengths: list[int], seed: int) -> None:
    probe = probe_of(lengths)
    golden = golden_of(probe, seed)
    found = from_json(to_json(golden, probe), probe, "x.json")
    assert found.key == golden.key
    assert found.history == golden.history
    assert found.measurement.logprob.tobytes() == golden.measurement.logprob.tobytes()
    assert found.measurement.top1.tobytes() == golden.measurement.top1.tobytes()
    assert found.measurement.provenance == dataclasses.replace(PROVENANCE, source="golden")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda text: text[:-40], "damaged"),
        (lambda text: text.replace('"identity"', '"identify"'), "its sha256 is not that of what"),
        (lambda text: text.replace('"schema": 2', '"schema": 9'), "schema 9"),
        (
            lambda text: text.replace('"logprob": "', '"logprob": "!'),
            "its sha256 is not that of what",
        ),
        (
            lambda text: sealed(json.loads(text.replace('"logprob": "', '"logprob": "!'))),
            "damaged",
        ),
        (
            lambda text: re.sub(r'"mean_nll": -?', '"mean_nll": 9', text),
            "its sha256 is not that of what it holds",
        ),
        (lambda _: "[]", "damaged"),
    ],
)
def test_damage_is_noticed_and_named(damage, message: str) -> None:  # type: ignore[no-untyped-def]
    probe = probe_of([5, 5, 5])
    with pytest.raises(BadInput, match=message) as error:
        from_json(damage(to_json(golden_of(probe), probe)), probe, "x.json")
    assert str(error.value).startswith("x.json: ")


def test_a_figure_that_another_processor_computed_is_no_damage() -> None:
    """`exp` and means of the same values differ in their last bit from machine to machine."""
    probe = probe_of([5, 5, 5])
    content = json.loads(to_json(golden_of(probe), probe))
    figure = content["measured"]["perplexity"]
    content["measured"]["perplexity"] = float(np.nextafter(figure, np.inf))
    golden = from_json(sealed(content), probe, "x.json")
    assert golden.measurement.logprob.tobytes() == golden_of(probe).measurement.logprob.tobytes()


@pytest.mark.parametrize("width", [1, 5, SKETCH, SKETCH + 1, 200])
def test_outputs_of_models_that_pool_are_kept_whole_or_as_a_sketch(width: int) -> None:
    probe = dataclasses.replace(probe_of([5, 3, 9]), task="token_embed")
    rng = np.random.default_rng(0)
    values = rng.normal(size=(probe.scored, width)).astype(np.float32)
    provenance = Provenance("engine", "cpu", "cpu", "float32")
    kept = as_stored(pooled(values, provenance))
    assert kept.values.shape == (probe.scored, min(width, SKETCH))
    golden = Golden(golden_of(probe).key, kept, ())
    found = from_json(to_json(golden, probe), probe, "x.json").measurement
    assert found.values.tobytes() == kept.values.tobytes()
    assert found.top1.tolist() == kept.top1.tolist()
    # A change of one component of one row is seen in what is kept, about as large.
    moved = values.copy()
    moved[3, width // 2] += 0.5
    change = np.abs(as_stored(pooled(moved, provenance)).values - kept.values)
    assert np.flatnonzero(change.max(axis=1)).tolist() == [3]
    assert change.max() == pytest.approx(0.5 / (width**0.5 if width > SKETCH else 1), rel=1e-3)
    damaged = re.sub(r'"rms": \d', '"rms": 9', to_json(golden, probe))
    with pytest.raises(BadInput, match="its sha256 is not that of what it holds"):
        from_json(damaged, probe, "x.json")


def test_an_interrupted_write_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "golden.json"
    write_atomically(path, "old")

    def killed(_: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("os.fsync", killed)
    with pytest.raises(KeyboardInterrupt):
        write_atomically(path, "new")
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["golden.json"]
