"""Whole next-token distributions: how far are they from the reference's, and from the base's?"""

from quantgate.pytest_plugin import Gate


def test_divergence_from_reference(gate: Gate) -> None:
    """In the dtype that is served, distributions are the reference's but for its rounding."""
    gate.ask()


def test_divergence_from_base(gate: Gate) -> None:
    """Quantization moves distributions by no more than its scheme's budget."""
    gate.ask()
