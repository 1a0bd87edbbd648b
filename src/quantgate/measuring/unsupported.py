"""Why vLLM did not load a checkpoint, if the checkpoint or the release itself shows it.

Examined once a load has failed: an exception from deep inside vLLM says what broke, not why.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from quantgate.errors import BadInput
from quantgate.formats.stored import StoredTensors
from quantgate.measuring.checkpoint_names import CheckpointNames
from quantgate.measuring.empty_model import empty_model
from quantgate.patches.scoremode.hooks import vllm_version
from quantgate.subject.files import actual_scheme, read_config
from quantgate.subject.scheme import UNQUANTIZED
from quantgate.subject.task import task_of

# vLLM's message that a platform has no kernel for quantized experts.
NO_EXPERTS = ("moe backend", "no moe", "fusedmoe", "fused_moe", "moe_backend")


def why_not_loaded(directory: Path, said: str) -> str | None:
    """Return in one sentence why vLLM did not load a checkpoint; None to leave it at vLLM's words.

    `said` is the reason that vLLM gave.
    """
    if not directory.is_dir():
        return None  # a hub id, which only tools give
    config = read_config(directory)
    architecture = next(iter(config.get("architectures") or ()), None)
    if architecture is None:
        return (
            f"{directory}: config.json names no architecture; add `architectures`, as its base has."
        )
    if not _is_registered(architecture):
        return (
            f"{directory}: vLLM {vllm_version()} has no {architecture} (model_type "
            f"'{config.get('model_type')}'), so nothing of it can be served; install a release of "
            "vLLM that has it, or take it out of the gate."
        )
    scheme = actual_scheme(directory)
    if scheme != UNQUANTIZED and any(words in said.lower() for words in NO_EXPERTS):
        emulation = re.search(r"no MoE backend on CPU: (.*) are not emulated", said)
        also = f", and quantgate does not emulate {emulation[1]}" if emulation else ""
        return (
            f"{directory}: vLLM {vllm_version()} has no kernel on this platform for the {scheme} "
            f"experts of {architecture}{also}; gate it where vLLM serves them, on a GPU."
        )
    try:
        return _contradiction(directory, config)
    except BadInput as error:
        return str(error)


def _is_registered(architecture: str) -> bool:
    """Whether vLLM has an architecture, or one of the same body that it converts to it."""
    from vllm import ModelRegistry
    from vllm.config.model import iter_architecture_defaults, try_match_architecture_defaults

    names = {architecture}
    if (match := try_match_architecture_defaults(architecture)) is not None:
        suffix, _ = match
        names |= {architecture.replace(suffix, other) for other, _ in iter_architecture_defaults()}
    return not names.isdisjoint(ModelRegistry.get_supported_archs())


def _contradiction(directory: Path, config: dict[str, Any]) -> str | None:
    """Return the first tensor that is missing, or whose shape contradicts the config."""
    import torch

    stored = StoredTensors(directory)
    model = empty_model(directory, torch.float32, task_of(config), stored, torch.device("cpu"))
    names = CheckpointNames(model, stored.names)
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    for name, parameter in model.named_parameters():
        own = names.origin_of(name)
        if own is None:
            if name in tied:
                continue
            return (
                f"{directory}: there is no tensor '{name}' in its weights, and its config.json "
                "implies one; export the checkpoint again, or correct config.json by the base's."
            )
        if own and own in stored and (shape := stored.shape(own)) != list(parameter.shape):
            return (
                f"{directory}: '{own}' is {shape} in the weights, but config.json implies "
                f"{list(parameter.shape)}; correct its sizes by the base's (hidden_size, head_dim, "
                "intermediate_size, vocab_size …), or export the checkpoint again."
            )
    return None
