"""Is it computed correctly? Exact scores, labels, rewards, embeddings against the reference's."""

from quantgate.pytest_plugin import Gate


def test_fidelity(gate: Gate, dtype: str) -> None:
    """vLLM and HF compute the same function of the weights: loading and packing are correct."""
    gate.ask()


def test_long_context(gate: Gate) -> None:
    """In contexts of thousands of tokens vLLM and HF still compute the same function."""
    gate.ask()
