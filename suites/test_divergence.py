"""Whole next-token distributions: how far are they from the reference's, and from the base's?"""

import pytest

from quantgate import compare, fidelity
from quantgate.budget import quality_margin
from quantgate.checkpoint import Checkpoint
from quantgate.pytest_plugin import Gate

pytestmark = pytest.mark.tasks("generate")


def test_divergence_from_reference(gate: Gate, checkpoint: Checkpoint, device: str) -> None:
    """In the dtype that is served, distributions are the reference's but for its rounding."""
    gate.judge(fidelity.divergence(gate.sources, checkpoint))


@pytest.mark.needs("base")
def test_divergence_from_base(gate: Gate, checkpoint: Checkpoint, device: str) -> None:
    """Quantization moves distributions by no more than its scheme's budget."""
    base = checkpoint.base_checkpoint
    assert base is not None
    engine, unquantized = (gate.sources.for_quality(c) for c in (checkpoint, base))
    probe = gate.sources.probe_of(checkpoint, quality=True)
    found = gate.sources.divergence(unquantized, base, engine, checkpoint, probe)
    margin = quality_margin(checkpoint, gate.run.schemes[checkpoint.id])
    gate.judge(compare.divergence_from_base(engine, unquantized, found, probe, margin=margin))
