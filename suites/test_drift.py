"""What has changed since approval?"""

from quantgate.pytest_plugin import Gate


def test_drift(gate: Gate, dtype: str) -> None:
    """The served results match the approved golden."""
    gate.ask()
