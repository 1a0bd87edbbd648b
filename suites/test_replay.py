"""Which module, and which kernel, is off? Every linear on the input that it was given."""

from quantgate.pytest_plugin import Gate


def test_replay(gate: Gate, dtype: str) -> None:
    """On the engine's own inputs, every linear gives what its weights say."""
    gate.ask()
