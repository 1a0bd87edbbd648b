"""Which module, and which kernel, is wrong? Checks every linear on the engine's own input."""

from quantgate.pytest_plugin import Gate


def test_replay(gate: Gate, dtype: str) -> None:
    """On the engine's own inputs, every linear computes what its weights define."""
    gate.ask()
