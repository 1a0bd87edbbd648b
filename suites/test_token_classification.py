"""Token classifiers: are the labels of every token served right, and as good as the base's?"""

import pytest
from syrupy.assertion import SnapshotAssertion

from quantgate import fidelity, pooled, task_quality
from quantgate.checkpoint import Checkpoint
from quantgate.drift import drift
from quantgate.pytest_plugin import Gate

pytestmark = pytest.mark.tasks("token_classify")


def test_fidelity_float32(gate: Gate, checkpoint: Checkpoint, device: str) -> None:
    """vLLM and HF give the same raw logits: loading, packing and head are right."""
    gate.judge(fidelity.float32(gate.sources, checkpoint))


def test_fidelity_serving(gate: Gate, checkpoint: Checkpoint, device: str) -> None:
    """In the dtype that is served, raw logits are off by no more than its rounding."""
    gate.judge(fidelity.serving(gate.sources, checkpoint))


@pytest.mark.parametrize("dtype", ["float32", "serving"])
def test_replay(gate: Gate, checkpoint: Checkpoint, device: str, dtype: str) -> None:
    """On the engine's own inputs, every linear gives what its weights say."""
    gate.judge(fidelity.replay(gate.sources, checkpoint, dtype))


def test_activation(gate: Gate, checkpoint: Checkpoint, device: str) -> None:
    """Probabilities are softmax, sigmoid or nothing of the logits, as the config says."""
    gate.judge(pooled.activation(gate.sources, checkpoint))


@pytest.mark.needs("base")
def test_head(gate: Gate, checkpoint: Checkpoint, device: str) -> None:
    """The head and the names of its labels are the base's, and not quantized."""
    gate.judge(pooled.head(gate.sources, checkpoint))


@pytest.mark.needs("base")
def test_quality(gate: Gate, checkpoint: Checkpoint, device: str) -> None:
    """Entities are found as well as by the base."""
    gate.judge(task_quality.quality(gate.sources, checkpoint))


@pytest.mark.needs("golden")
@pytest.mark.parametrize("dtype", ["float32", "serving"])
def test_drift(
    gate: Gate, checkpoint: Checkpoint, device: str, dtype: str, snapshot: SnapshotAssertion
) -> None:
    """What is served is what a person approved."""
    gate.judge(drift(gate.sources, checkpoint, dtype, snapshot, gate.check))
