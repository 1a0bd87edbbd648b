"""What did quantization cost?"""

from quantgate.pytest_plugin import Gate


def test_quality(gate: Gate) -> None:
    """It costs no more than its budget: of perplexity, or of the metric of its task."""
    gate.ask()
