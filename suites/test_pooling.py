"""Models that pool: are activations, heads, steps and scores what config and base say?"""

from quantgate.pytest_plugin import Gate


def test_activation(gate: Gate) -> None:
    """Outputs are softmax, sigmoid, nothing or unit length of the raw ones, as the config says."""
    gate.ask()


def test_head(gate: Gate) -> None:
    """The head and the names of its labels are the base's, and not quantized."""
    gate.ask()


def test_steps(gate: Gate) -> None:
    """STEP pooling gives the rewards of the step tags, and of no other token."""
    gate.ask()


def test_late_interaction(gate: Gate) -> None:
    """`LLM.score` of two texts is the max-sim of their token embeddings."""
    gate.ask()
