"""The reference source: HF modules over dequantized weights, one decoder layer in memory at a time.

Inputs are quantized as vLLM quantizes them, and scales fused as vLLM fuses them
(formats/linear.py), so that engine and reference compute the same function of the same bytes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from quantgate.formats.kernels import FORMATS_RULES, LinearRules
from quantgate.measuring.environment import library_versions
from quantgate.measuring.measurement import Announce, Measurement, Provenance, pooled
from quantgate.measuring.reference_device import CPU, exactly, platform_of, room_on
from quantgate.measuring.streamed_model import StreamedModel
from quantgate.subject.task import GENERATE

if TYPE_CHECKING:
    import torch

    from quantgate.formats.builds import Narrowing
    from quantgate.measuring.parameters import DequantizerName
    from quantgate.subject.probe import Probe

# The function from hidden states [rows, H] to float32 logits [rows, V], and V.
Head = tuple[Callable[["torch.Tensor"], "torch.Tensor"], int]


def measure(  # noqa: PLR0913  five independent choices of how to compute
    directory: Path,
    probe: Probe,
    *,
    dtype: str,
    announce: Announce,
    dequantizer: DequantizerName = "own",
    narrowing: Narrowing = "rounds",
    rules: LinearRules = FORMATS_RULES,
    device: str = CPU,
) -> Measurement:
    """Score `probe` with HF modules in `dtype` over the checkpoint's dequantized weights.

    The head's product and the log-softmax are in float32, or in float64 if `dtype` is float64.
    `narrowing` is how rotations and attention convert to bfloat16 (`builds.narrowing`), `rules` how
    the engine's kernels compute linears, `device` where everything is computed ("cpu", "cuda").
    """

    def score() -> Measurement:
        model = StreamedModel(directory, dtype, dequantizer, probe.task, narrowing, rules, device)
        return _measured(model, probe, dtype, announce)

    # In a function of its own: a name for the model here would keep its memory from what follows.
    with room_on(device):
        return score()


def name_of(
    dequantizer: DequantizerName, narrowing: Narrowing, device: str, rules: LinearRules
) -> str:
    """Return the name of a reference computed this way, for progress and for its key in memory."""
    name = "HF reference" if dequantizer == "own" else f"HF reference ({dequantizer})"
    name += ", which truncates" if narrowing == "truncates" else ""
    name += ", with int8 inputs" if rules.int8 else ""
    return name if device == CPU else f"{name} on {device}"


def _measured(model: StreamedModel, probe: Probe, dtype: str, announce: Announce) -> Measurement:
    import torch

    hidden = model.last_hidden(probe.windows, announce)
    announce(f"scoring {probe.scored} tokens in {len(probe.windows)} windows")
    device = model.device.type
    provenance = Provenance(
        "reference", device, platform_of(device), dtype, versions=library_versions()
    )
    if probe.task != GENERATE:
        found = pooled(model.outputs(probe.windows, hidden), provenance)
        return dataclasses.replace(found, experts=model.chosen_experts())
    logprob, top1 = model.scores(probe.windows, hidden)
    kept = None
    if dtype != "float64":
        scored = zip(probe.windows, hidden, strict=True)
        with torch.inference_mode():
            states = torch.cat([rows[w.score_from - 1 :] for w, rows in scored])
            kept = states.float().cpu().numpy()
    return Measurement(logprob, top1, provenance, kept, experts=model.chosen_experts())


def read_head(directory: Path, device: str = CPU) -> Head:
    """Return a checkpoint's head, on `device`."""
    model = StreamedModel(directory, "float32", device=device)
    model.fill_outside()
    model.parameters.promote_head()

    def logits(hidden: torch.Tensor) -> torch.Tensor:
        with exactly(model.device):
            return model.logits(hidden)

    return logits, int(model.model.get_output_embeddings().weight.shape[0])
