"""Pooling models: do activations, heads, steps and scores agree with config and base?"""

from quantgate.pytest_plugin import Gate


def test_activation(gate: Gate) -> None:
    """Outputs are the raw ones after the config's softmax, sigmoid, normalization or nothing."""
    gate.ask()


def test_head(gate: Gate) -> None:
    """The head and its label names equal the base's, and the head is not quantized."""
    gate.ask()


def test_steps(gate: Gate) -> None:
    """STEP pooling returns the rewards of the step tags, and of no other token."""
    gate.ask()


def test_late_interaction(gate: Gate) -> None:
    """`LLM.score` of two texts is the max-sim of their token embeddings."""
    gate.ask()
