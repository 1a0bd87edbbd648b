"""A check of the reference: one window of the streamed model against HF's own, loaded whole.

Both have the same dequantized weights, and neither quantizes inputs, keys or values, so they can
differ only in how the model is taken apart: its names, norms, head and attention. HF loads it with
its own `from_pretrained` and uses eager attention: fused attention silently ignores what it does
not support. Falcon with ALiBi is the exception: its eager attention scales ALiBi differently from
its sdpa and from vLLM.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from quantgate.formats.groups import group_of
from quantgate.formats.kernels import Family, LinearRules
from quantgate.formats.linear import read_linear
from quantgate.formats.stored import StoredTensors
from quantgate.measuring.empty_model import (
    embeds_by_itself,
    hf_class,
    one_by_one,
    uncompiled,
)
from quantgate.measuring.parameters import dequantizer
from quantgate.measuring.reference_device import exactly
from quantgate.measuring.streamed_model import StreamedModel
from quantgate.subject.files import read_config
from quantgate.subject.task import EMBED, GENERATE

if TYPE_CHECKING:
    import numpy as np
    import torch

    from quantgate.subject.probe import Probe, Window

WEIGHTS_ALONE = LinearRules(kept=frozenset(get_args(Family)))


def difference_from_whole(directory: Path, probe: Probe) -> float | None:
    """Return the largest |Δ| between the streamed and the whole model on a short window.

    None if the whole model, in float32, would take more than half of the free memory.
    """
    window = min(probe.windows, key=lambda window: len(window.ids))
    streamed = StreamedModel(directory, "float32", task=probe.task, rules=WEIGHTS_ALONE)
    streamed.quantization = None  # keys and values unquantized
    sizes = (parameter.numel() for parameter in streamed.model.parameters())
    if 2 * 4 * sum(sizes) > os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"):
        return None
    hidden = streamed.last_hidden((window,), lambda _: None)
    own = (
        streamed.scores((window,), hidden)[0]
        if probe.task == GENERATE
        else streamed.outputs((window,), hidden)
    )
    return float(abs(own - _whole(streamed, window)).max())


def _whole(streamed: StreamedModel, window: Window) -> np.ndarray[Any, Any]:
    """Return log-probabilities [n], or raw outputs [n, D], of a window's scored tokens."""
    import torch

    model = _loaded_whole(streamed)
    ids = torch.tensor(window.ids)
    with exactly(ids.device):
        if streamed.task == GENERATE:
            logits = model(ids[None, :-1], use_cache=False).logits[0]
            every = logits.log_softmax(-1).gather(1, ids[1:, None])[:, 0]
        elif streamed.task == EMBED and embeds_by_itself(model):
            every = model.base_model(ids[None], use_cache=False).last_hidden_state[0]
        else:
            logits = model(ids[None]).logits  # of every token, or one row for the whole window
            every = logits.reshape(-1, logits.shape[-1])
        found: np.ndarray[Any, Any] = every[-window.scored :].numpy()
    return found


def _loaded_whole(streamed: StreamedModel) -> Any:
    import torch

    kind, config = hf_class(streamed.stored.directory, streamed.task, streamed.stored)
    with uncompiled(config):
        model = kind.from_pretrained(
            None,
            config=config,
            state_dict=_weights(streamed.stored),
            dtype=torch.float32,
            attn_implementation="sdpa" if getattr(config, "alibi", False) else "eager",
        )
    one_by_one(model)
    return model.eval()


def _weights(stored: StoredTensors) -> dict[str, torch.Tensor]:
    """Return all of a checkpoint's tensors, quantized linears as dequantized weights."""
    quantization = read_config(stored.directory).get("quantization_config")
    weights: dict[str, torch.Tensor] = {}
    for module in stored.modules:
        group = group_of(module, "Linear", quantization)
        parts = stored.of_module(module)
        if group is not None and "weight_scale" in parts:
            linear = read_linear(stored, module, group, dequantizer("own"), WEIGHTS_ALONE)
            parts = {name: parts[name] for name in parts if name == "bias"}
            parts["weight"] = linear.weight
        weights |= {f"{module}.{part}" if module else part: t for part, t in parts.items()}
    return weights
