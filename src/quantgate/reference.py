"""The reference source: HF modules over decompressed weights."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from quantgate.checkpoint import BadInput, read_config
from quantgate.engine import Announce, library_versions
from quantgate.measurement import Measurement, Provenance
from quantgate.probe import Probe

if TYPE_CHECKING:
    import torch

# Rows of full-vocabulary float32 logits held at once: 128 MiB at a vocabulary of 128k.
LOGIT_ROWS = 256


def measure(directory: Path, probe: Probe, *, dtype: str, announce: Announce) -> Measurement:
    """Score `probe` with HF modules in `dtype` over the checkpoint's decompressed weights.

    Only weights are dequantized; inputs stay as they are. The head's product and the log-softmax
    are in float32, or in float64 where `dtype` is that.
    """
    import torch

    model = load_decompressed(directory, dtype)
    announce(f"scoring {probe.scored} tokens in {len(probe.windows)} windows")
    logprobs, tops = [], []
    with torch.inference_mode():
        for window in probe.windows:
            ids = torch.tensor(window.ids)
            hidden = model.base_model(ids[None]).last_hidden_state[0]
            logprob, top1 = _score(
                model, hidden[window.score_from - 1 : -1], ids[window.score_from :]
            )
            logprobs.append(logprob)
            tops.append(top1)
    provenance = Provenance("reference", "cpu", "cpu", dtype, versions=library_versions())
    return Measurement(np.concatenate(logprobs), np.concatenate(tops), provenance)


def load_decompressed(directory: Path, dtype: str) -> Any:
    """Return the checkpoint as an HF causal LM in `dtype`, its weights dequantized."""
    import torch
    from transformers import AutoModelForCausalLM, CompressedTensorsConfig

    quantized = "quantization_config" in read_config(directory)
    try:
        model = AutoModelForCausalLM.from_pretrained(
            directory,
            dtype=getattr(torch, dtype),
            trust_remote_code=False,
            use_safetensors=True,
            **(
                {"quantization_config": CompressedTensorsConfig(dequantize=True)}
                if quantized
                else {}
            ),
        )
    except (OSError, ValueError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise BadInput(f"{directory}: transformers cannot load it ({reason}).") from None
    for module in model.modules():
        # HF would go on quantizing inputs, by compressed-tensors' rules, which are not vLLM's.
        if hasattr(module, "quantization_enabled"):
            module.quantization_enabled = False
    return model.to(getattr(torch, dtype)).eval()


def _score(
    model: Any, hidden: torch.Tensor, targets: torch.Tensor
) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    import torch

    head = model.get_output_embeddings()
    exact = torch.promote_types(head.weight.dtype, torch.float32)
    weight = head.weight.to(exact)
    bias = None if head.bias is None else head.bias.to(exact)
    logprob, top1 = [], []
    for start in range(0, len(targets), LOGIT_ROWS):
        rows = slice(start, start + LOGIT_ROWS)
        logits = torch.nn.functional.linear(hidden[rows].to(exact), weight, bias)
        logprob.append(logits.log_softmax(dim=-1).gather(1, targets[rows, None])[:, 0])
        top1.append(logits.argmax(dim=-1))
    return torch.cat(logprob).numpy(), torch.cat(top1).numpy().astype(np.int32)
