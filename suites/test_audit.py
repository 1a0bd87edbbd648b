"""Is anything wrong with the checkpoint's files, and is what vLLM has loaded what they hold?"""

from quantgate.pytest_plugin import Gate


def test_audit(gate: Gate) -> None:
    """Headers, scales, config and tokenizer are intact, and agree with the base's."""
    gate.ask()


def test_audit_weights(gate: Gate) -> None:
    """Every weight is a quantization of the base's."""
    gate.ask()


def test_audit_loaded(gate: Gate) -> None:
    """Every parameter that vLLM has loaded is what the file holds."""
    gate.ask()
