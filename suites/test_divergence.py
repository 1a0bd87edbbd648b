"""Whole next-token distributions: how far are they from the reference's, and from the base's?"""

from quantgate.pytest_plugin import Gate


def test_divergence_from_reference(gate: Gate) -> None:
    """In the serving dtype, distributions differ from the reference's only by rounding."""
    gate.ask()


def test_divergence_from_base(gate: Gate) -> None:
    """Quantization moves distributions by no more than its scheme's budget."""
    gate.ask()
