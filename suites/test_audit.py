"""Is anything wrong with the checkpoint's files? Asked before an engine starts."""

from quantgate.pytest_plugin import Gate


def test_audit(gate: Gate) -> None:
    """Headers, scales, config and tokenizer are whole, and say what the base's say."""
    gate.ask()


def test_audit_weights(gate: Gate) -> None:
    """Every weight is what quantizing the base's gives."""
    gate.ask()
