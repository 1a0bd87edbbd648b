"""Is it computed right? Exact scores, labels, rewards and embeddings beside the reference's."""

from quantgate.pytest_plugin import Gate


def test_fidelity(gate: Gate, dtype: str) -> None:
    """vLLM and HF compute the same function of the same weights: loading and packing are right."""
    gate.ask()
