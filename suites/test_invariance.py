"""The same measurement however it is served: chunks, order, batches, caches, ranks, graphs."""

import pytest

from quantgate import invariance
from quantgate.checkpoint import Checkpoint
from quantgate.pytest_plugin import Gate

pytestmark = pytest.mark.parametrize("dtype", ["float32", "serving"])


def test_invariance(gate: Gate, checkpoint: Checkpoint, device: str, dtype: str) -> None:
    """What a request gets depends neither on what else is served, nor on chunks or the cache."""
    gate.judge(invariance.served_otherwise(gate.sources, checkpoint, dtype))


@pytest.mark.needs("tensor-parallel")
def test_tensor_parallel(gate: Gate, checkpoint: Checkpoint, device: str, dtype: str) -> None:
    """Two ranks, each with its shard of every layer, give what one gives."""
    gate.judge(invariance.tensor_parallel(gate.sources, checkpoint, dtype))


@pytest.mark.needs("compiled")
def test_compiled(gate: Gate, checkpoint: Checkpoint, device: str, dtype: str) -> None:
    """A compiled engine gives what an eager one gives."""
    gate.judge(invariance.compiled(gate.sources, checkpoint, dtype))
