"""Is it computed correctly? Exact scores, labels, rewards, embeddings against the reference's."""

from quantgate.pytest_plugin import Gate


def test_fidelity(gate: Gate, dtype: str) -> None:
    """vLLM and HF compute the same function of the weights: loading and packing are correct."""
    gate.ask()
