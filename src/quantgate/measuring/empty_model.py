"""The HF model of a checkpoint's config, with its buffers and without its weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantgate.errors import BadInput
from quantgate.measuring.engine_failure import first_line
from quantgate.measuring.heads import COLBERT, head_classes

if TYPE_CHECKING:
    import torch

    from quantgate.formats.stored import StoredTensors
    from quantgate.subject.task import Task


def require_understood(directory: Path, quantization: Mapping[str, Any]) -> None:
    """Refuse a quantization_config that the reference has no rule for, with `BadInput`."""
    if (reason := _why_not_understood(quantization)) is not None:
        raise BadInput(f"{directory / 'config.json'}: {reason}; the reference has no rule for it.")


def _why_not_understood(quantization: Mapping[str, Any]) -> str | None:
    """Return what in a quantization_config would make a reference without it a wrong one."""
    method = quantization.get("quant_method", "compressed-tensors")
    if method != "compressed-tensors":
        return f"quant_method is '{method}', not 'compressed-tensors'"
    if quantization.get("transform_config"):
        return "transform_config rotates weights and inputs"
    if (quantization.get("sparsity_config") or {}).get("format", "dense") != "dense":
        return "sparsity_config stores weights sparsely"
    cache = quantization.get("kv_cache_scheme") or {}
    if cache and (cache.get("type"), cache.get("strategy")) != ("float", "tensor"):
        return "kv_cache_scheme is not FP8 with a scale for each tensor"
    for name, group in (quantization.get("config_groups") or {}).items():
        if not group.get("weights"):
            return f"config group '{name}' has no weights"
        if group.get("output_activations"):
            return f"config group '{name}' quantizes outputs"
    return None


def empty_model(
    directory: Path, dtype: torch.dtype, task: Task, stored: StoredTensors, device: torch.device
) -> Any:
    """Return the HF model of a checkpoint's config: parameters on `meta`, buffers on `device`.

    Raises `BadInput` where transformers cannot build it.
    """
    import torch
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(directory, trust_remote_code=False)
        if hasattr(config, "quantization_config"):
            del config.quantization_config
        with torch.device("meta"):
            model = _model_class(config, task, stored)(
                config, dtype=dtype, trust_remote_code=False, attn_implementation="sdpa"
            )
    except (OSError, ValueError) as error:
        raise BadInput(
            f"{directory}: transformers cannot build it ({first_line(error)})."
        ) from None
    _compute_buffers(model, device)
    return model.eval()


def _model_class(config: Any, task: Task, stored: StoredTensors) -> Callable[..., Any]:
    """Return what builds the HF model of a config that does a task."""
    import transformers

    architecture = next(iter(config.architectures or ()), "")
    if (own := head_classes().get(architecture)) is not None:
        if architecture == COLBERT:
            config.colbert_dim = len(stored.read("linear.weight"))
        return lambda config, trust_remote_code, **options: own._from_config(config, **options)
    kind = {
        "token_classify": transformers.AutoModelForTokenClassification,
        "token_reward": transformers.AutoModelForTokenClassification,
        "sequence_reward": transformers.AutoModelForSequenceClassification,
    }.get(task, transformers.AutoModelForCausalLM)
    build: Callable[..., Any] = kind.from_config
    return build


def _compute_buffers(model: Any, device: torch.device) -> None:
    """Compute the buffers that no checkpoint stores, e.g. rotary frequencies, as HF does.

    On the CPU, whatever the device: powers and sines of another one may have other last bits.
    """
    import torch

    for module in model.modules():
        missing = [name for name, b in module.named_buffers(recurse=False) if b.is_meta]
        for name in missing:
            module._buffers[name] = torch.empty_like(module._buffers[name], device="cpu")
        if missing:
            with torch.no_grad():
                model._init_weights(module)
        for name, buffer in module.named_buffers(recurse=False):
            module._buffers[name] = buffer.to(device)
