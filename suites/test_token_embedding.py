"""Token embedders: is every vector served right, and do they find what the base's find?"""

import pytest
from syrupy.assertion import SnapshotAssertion

from quantgate import fidelity, pooled, task_quality
from quantgate.checkpoint import Checkpoint
from quantgate.drift import drift
from quantgate.pytest_plugin import Gate

pytestmark = pytest.mark.tasks("token_embed")


def test_fidelity_float32(gate: Gate, checkpoint: Checkpoint, device: str) -> None:
    """vLLM and HF give the same raw embeddings: loading, packing and head are right."""
    gate.judge(fidelity.float32(gate.sources, checkpoint))


def test_fidelity_serving(gate: Gate, checkpoint: Checkpoint, device: str) -> None:
    """In the dtype that is served, raw embeddings are off by no more than its rounding."""
    gate.judge(fidelity.serving(gate.sources, checkpoint))


@pytest.mark.parametrize("dtype", ["float32", "serving"])
def test_replay(gate: Gate, checkpoint: Checkpoint, device: str, dtype: str) -> None:
    """On the engine's own inputs, every linear gives what its weights say."""
    gate.judge(fidelity.replay(gate.sources, checkpoint, dtype))


def test_activation(gate: Gate, checkpoint: Checkpoint, device: str) -> None:
    """Embeddings are of unit length, and the raw ones' direction."""
    gate.judge(pooled.activation(gate.sources, checkpoint))


def test_late_interaction(gate: Gate, checkpoint: Checkpoint, device: str) -> None:
    """`LLM.score` of two texts is the max-sim of their token embeddings."""
    gate.judge(pooled.late_interaction(gate.sources, checkpoint))


@pytest.mark.needs("base")
@pytest.mark.needs("own_metric")
def test_quality(gate: Gate, checkpoint: Checkpoint, device: str) -> None:
    """Queries find their documents as well as with the base's embeddings."""
    gate.judge(task_quality.quality(gate.sources, checkpoint))


@pytest.mark.needs("golden")
@pytest.mark.parametrize("dtype", ["float32", "serving"])
def test_drift(
    gate: Gate, checkpoint: Checkpoint, device: str, dtype: str, snapshot: SnapshotAssertion
) -> None:
    """What is served is what a person approved."""
    gate.judge(drift(gate.sources, checkpoint, dtype, snapshot, gate.check))
