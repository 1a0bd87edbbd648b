"""What did quantization cost?"""

from quantgate.pytest_plugin import Gate


def test_quality(gate: Gate) -> None:
    """Quantization costs no more perplexity, or task metric, than the budget allows."""
    gate.ask()
