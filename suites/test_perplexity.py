"""Exact log-probabilities, token by token: is it served right, what did quantization cost, and
what changed since it was approved?"""

import pytest
from syrupy.assertion import SnapshotAssertion

from quantgate import compare, fidelity
from quantgate.budget import quality_margin
from quantgate.checkpoint import Checkpoint
from quantgate.drift import drift
from quantgate.pytest_plugin import Gate

pytestmark = pytest.mark.tasks("generate")


def test_fidelity_float32(gate: Gate, checkpoint: Checkpoint, device: str) -> None:
    """vLLM and HF compute the same function of the same weights: loading and packing are right."""
    gate.judge(fidelity.float32(gate.sources, checkpoint))


def test_fidelity_serving(gate: Gate, checkpoint: Checkpoint, device: str) -> None:
    """In the dtype that is served, vLLM is off by no more than that dtype's rounding."""
    gate.judge(fidelity.serving(gate.sources, checkpoint))


@pytest.mark.parametrize("dtype", ["float32", "serving"])
def test_replay(gate: Gate, checkpoint: Checkpoint, device: str, dtype: str) -> None:
    """On the engine's own inputs, every linear gives what its weights say."""
    gate.judge(fidelity.replay(gate.sources, checkpoint, dtype))


@pytest.mark.needs("base")
def test_quality(gate: Gate, checkpoint: Checkpoint, device: str) -> None:
    """Quantization costs no more than its scheme's budget, in the dtype that is served."""
    base = checkpoint.base_checkpoint
    assert base is not None
    engine, unquantized = (gate.sources.for_quality(c) for c in (checkpoint, base))
    margin = quality_margin(checkpoint, gate.run.schemes[checkpoint.id])
    probe = gate.sources.probe_of(checkpoint, quality=True)
    gate.judge(compare.quality(engine, unquantized, probe, margin=margin))


@pytest.mark.needs("golden")
@pytest.mark.parametrize("dtype", ["float32", "serving"])
def test_drift(
    gate: Gate, checkpoint: Checkpoint, device: str, dtype: str, snapshot: SnapshotAssertion
) -> None:
    """What is served is what a person approved."""
    gate.judge(drift(gate.sources, checkpoint, dtype, snapshot, gate.check))
