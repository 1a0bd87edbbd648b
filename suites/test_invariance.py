"""Do results depend on how requests are served: chunks, order, batches, caches, ranks, graphs?"""

from quantgate.pytest_plugin import Gate


def test_invariance(gate: Gate, dtype: str) -> None:
    """A request's result does not depend on other requests, on chunking or on the cache."""
    gate.ask()


def test_tensor_parallel(gate: Gate, dtype: str) -> None:
    """Two ranks, each with its shard of every layer, give the same results as one."""
    gate.ask()


def test_compiled(gate: Gate, dtype: str) -> None:
    """A compiled engine gives the same results as an eager one."""
    gate.ask()
