"""The same measurement however it is served: chunks, order, batches, caches, ranks, graphs."""

from quantgate.pytest_plugin import Gate


def test_invariance(gate: Gate, dtype: str) -> None:
    """What a request gets depends neither on what else is served, nor on chunks or the cache."""
    gate.ask()


def test_tensor_parallel(gate: Gate, dtype: str) -> None:
    """Two ranks, each with its shard of every layer, give what one gives."""
    gate.ask()


def test_compiled(gate: Gate, dtype: str) -> None:
    """A compiled engine gives what an eager one gives."""
    gate.ask()
