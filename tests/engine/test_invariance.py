"""Invariance: ways of serving that must not matter, and faults that make them matter."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from quantgate.judging import invariance
from quantgate.measuring.case import Case
from quantgate.measuring.lab import Lab
from quantgate.measuring.ledger import Ledger
from quantgate.measuring.measurement import Measurement
from quantgate.subject.checkpoint import Checkpoint, EngineSettings
from quantgate.subject.checkpoint_file import read_checkpoint_file
from quantgate.subject.probe import Probe, stored_probe
from quantgate.subject.windows import mixed

ROOT = Path(__file__).resolve().parents[2]


def few(checkpoint: Checkpoint, quality: bool) -> Probe:
    whole = stored_probe(checkpoint, quality)
    # Both long ones, so that each could get the other's blocks of the prefix cache.
    return dataclasses.replace(whole, windows=(*whole.windows[:30:6], *whole.windows[-2:]))


@pytest.fixture
def lab() -> Lab:
    return Lab(few, Ledger(lambda _: None))


@pytest.fixture
def w4a16() -> Checkpoint:
    path = ROOT / "fixtures" / "checkpoints" / "tiny-llama-w4a16.toml"
    return read_checkpoint_file(path, ROOT)


def test_an_honest_engine_gives_the_same_and_from_its_cache(lab: Lab, w4a16: Checkpoint) -> None:
    verdict = invariance.served_otherwise(Case.of(w4a16, "float32", lab))
    assert verdict.outcome == "pass", verdict.message("it")
    assert {deviation.what for deviation in verdict.deviations} == {
        "in order: max |Δ|",
        "shuffled: max |Δ|",
        "one by one: max |Δ|",
        "from the prefix cache: max |Δ|",
    }
    assert "in chunks of 64 tokens and from the prefix cache" in verdict.detail


def test_scores_that_depend_on_the_batch_are_found(
    lab: Lab, w4a16: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a ten-thousandth of how full the batch is."""
    from quantgate.patches.scoremode import logprob

    honest = logprob.score_rows

    def crowded(head: Any, hidden: Any, targets: Any) -> Any:
        found = honest(head, hidden, targets)
        return found._replace(logprob=found.logprob + 1e-4 * len(hidden) / 4096)

    monkeypatch.setattr(logprob, "score_rows", crowded)
    verdict = invariance.served_otherwise(Case.of(w4a16, "float32", lab))
    assert verdict.outcome == "fail"
    assert "what is served depends on how it is served" in verdict.detail
    assert sum(line.startswith("worst      heldout-") for line in verdict.evidence) == 5
    assert any("»" in line for line in verdict.evidence)
    assert any(line.startswith("kernels    ") for line in verdict.evidence)


def test_a_prefix_cache_that_gives_another_prompts_blocks_is_found(
    lab: Lab, w4a16: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Blocks are found by a hash of their tokens: here it knows only how many they are."""
    from vllm.v1.core import kv_cache_utils

    def careless(
        hash_function: Any, parent: Any, token_ids: Sequence[int], extra_keys: Any = None
    ) -> Any:
        return kv_cache_utils.BlockHash(hash_function((parent, len(token_ids), extra_keys)))

    monkeypatch.setattr(kv_cache_utils, "hash_block_tokens", careless)
    verdict = invariance.served_otherwise(Case.of(w4a16, "float32", lab))
    assert verdict.outcome == "fail", verdict.message("it")
    assert verdict.deviations[0].what == "from the prefix cache: max |Δ|"


@pytest.mark.parametrize("check", [invariance.tensor_parallel, invariance.compiled])
def test_an_engine_that_is_set_otherwise_is_compared(
    check: Any, lab: Lab, w4a16: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`make gate` starts such engines; here only what is made of their answers."""
    settings = []
    shifts: list[float] = []

    case = Case.of(w4a16, "float32", lab)

    def again(own: Case, changed: EngineSettings, probe: Probe) -> Measurement:
        settings.append(changed)
        _, rows = mixed(own.probe)
        found = case.engine
        return dataclasses.replace(found, values=found.values[rows] + np.float32(shifts[-1]))

    monkeypatch.setattr(Case, "set_otherwise", again)
    for shift, outcome in ((0.0, "pass"), (5e-6, "pass"), (5e-5, "fail"), (np.nan, "fail")):
        shifts.append(shift)
        assert check(case).outcome == outcome
    changed = [f.name for f in dataclasses.fields(settings[0])
               if getattr(settings[0], f.name) != getattr(w4a16.engine, f.name)]  # fmt: skip
    assert changed in (["tensor_parallel_size"], ["enforce_eager"])


def test_what_was_measured_of_another_checkpoint_is_let_go(lab: Lab, w4a16: Checkpoint) -> None:
    """Memory and captures; a base that the next one shares is kept."""
    path = ROOT / "fixtures" / "checkpoints" / "tiny-llama-w8a16.toml"
    other = read_checkpoint_file(path, ROOT)
    case = Case.of(w4a16, "float32", lab)
    assert case.base is not None
    assert case.replay.modules
    kept = case.base.engine
    assert lab._scratch is not None
    (captured,) = (path for path in lab._scratch.iterdir() if path.is_dir())
    before = case.engine
    lab.forget_others(w4a16)
    assert case.engine is before
    lab.forget_others(other)
    assert not captured.exists()
    assert case.base.engine is kept
    assert case.engine is not before
