"""What changed since it was approved?"""

from quantgate.pytest_plugin import Gate


def test_drift(gate: Gate, dtype: str) -> None:
    """What is served is what a person approved."""
    gate.ask()
