"""Exact log-probabilities, token by token: is it served right, what did quantization cost, and
what changed since it was approved?"""

import pytest
from syrupy.assertion import SnapshotAssertion

from quantgate import compare
from quantgate.budget import quality_margin
from quantgate.checkpoint import Checkpoint
from quantgate.golden import drift
from quantgate.pytest_plugin import Gate
from quantgate.scheme import quantizes_activations


def test_fidelity_float32(gate: Gate, checkpoint: Checkpoint, device: str) -> None:
    """vLLM and HF compute the same function of the same weights: loading and packing are right."""
    engine = gate.sources.engine(checkpoint, "float32")
    reference = gate.sources.reference(checkpoint, "float32")
    chaotic = quantizes_activations(gate.quantization_config(checkpoint))
    probe = gate.sources.probe_of(checkpoint)
    gate.judge(
        compare.fidelity_fp32(
            engine,
            reference,
            probe,
            exact_reference=lambda: gate.sources.reference(checkpoint, "float64"),
            chaotic=chaotic,
        )
    )


def test_fidelity_serving(gate: Gate, checkpoint: Checkpoint, device: str) -> None:
    """In the dtype that is served, vLLM is off by no more than that dtype's rounding."""
    engine = gate.sources.engine(checkpoint, "serving")
    reference = gate.sources.reference(checkpoint, "float32")
    rounded = gate.sources.reference(checkpoint, "serving")
    base_noise = None
    if (base := checkpoint.base_checkpoint) is not None:
        base_noise = compare.mean_absolute_difference(
            gate.sources.engine(base, "serving"), gate.sources.reference(base, "float32")
        )
    probe = gate.sources.probe_of(checkpoint)
    gate.judge(compare.fidelity_serving(engine, reference, rounded, probe, base_noise=base_noise))


@pytest.mark.needs("base")
def test_quality(gate: Gate, checkpoint: Checkpoint, device: str) -> None:
    """Quantization costs no more than its scheme's budget, in the dtype that is served."""
    base = checkpoint.base_checkpoint
    assert base is not None
    engine = gate.sources.engine(checkpoint, "serving")
    margin = quality_margin(checkpoint, gate.run.schemes[checkpoint.id])
    probe = gate.sources.probe_of(checkpoint)
    gate.judge(compare.quality(engine, gate.sources.engine(base, "serving"), probe, margin=margin))


@pytest.mark.needs("golden")
@pytest.mark.parametrize("dtype", ["float32", "serving"])
def test_drift(
    gate: Gate, checkpoint: Checkpoint, device: str, dtype: str, snapshot: SnapshotAssertion
) -> None:
    """What is served is what a person approved."""
    measured = gate.sources.engine(checkpoint, dtype)
    probe = gate.sources.probe_of(checkpoint)
    gate.judge(drift(snapshot, checkpoint, probe, measured, check=gate.check))
