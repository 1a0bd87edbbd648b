"""Is anything wrong with the checkpoint's files? Runs before an engine starts."""

from quantgate.pytest_plugin import Gate


def test_audit(gate: Gate) -> None:
    """Headers, scales, config and tokenizer are intact, and agree with the base's."""
    gate.ask()


def test_audit_weights(gate: Gate) -> None:
    """Every weight is a quantization of the base's."""
    gate.ask()
