"""The HF model of a checkpoint's config, with its buffers and without its weights."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from quantgate.errors import BadInput
from quantgate.measuring.heads import COLBERT, head_classes
from quantgate.measuring.layer_by_layer import layers_of
from quantgate.subject.files import read_config
from quantgate.subject.task import EMBED, Task

if TYPE_CHECKING:
    import torch

    from quantgate.formats.stored import StoredTensors


def require_understood(directory: Path, quantization: Mapping[str, Any]) -> None:
    """Raise `BadInput` for a quantization_config that the reference has no rule for."""
    if (reason := _why_not_understood(quantization)) is not None:
        raise BadInput(f"{directory / 'config.json'}: {reason}; the reference has no rule for it.")


def _why_not_understood(quantization: Mapping[str, Any]) -> str | None:
    """Return the part of a quantization_config that the reference cannot safely ignore, if any."""
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

    Raises `BadInput` if transformers cannot build it.
    """
    import torch

    kind, config = hf_class(directory, task, stored)
    attention = "sdpa" if getattr(kind, "_supports_sdpa", False) else "eager"
    with _refused(directory), uncompiled(config), torch.device("meta"):
        model = kind._from_config(config, dtype=dtype, attn_implementation=attention)
    if attention == "sdpa" and _needs_eager_attention(model):
        model.set_attn_implementation("eager")
    one_by_one(model)
    _compute_buffers(model, device)
    return model.eval()


def one_by_one(model: Any) -> None:
    """Have HF compute experts one by one: its grouped products do not support float64."""
    if hasattr(model, "set_experts_implementation") and model._can_set_experts_implementation():
        model.set_experts_implementation("eager")


def hf_class(directory: Path, task: Task, stored: StoredTensors) -> tuple[Any, Any]:
    """Return the HF class for a checkpoint's task, and its config without the quantization.

    Raises `BadInput` if transformers has no such class.
    """
    from transformers import AutoConfig

    with _refused(directory):
        config = AutoConfig.from_pretrained(directory, trust_remote_code=False)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    return _model_class(directory, config, task, stored), config


def embeds_by_itself(model: Any) -> bool:
    """Whether a model's embeddings are its last hidden states: a body, or one that generates."""
    return model.base_model is model or model.get_output_embeddings() is not None


def decoder_of(model: Any) -> Any:
    """Return the part of a model that reads text: its body, or a module within that."""
    find = getattr(model, "get_decoder", None)
    found = model.base_model if find is None else find()
    return model.base_model if found is None or found is model else found


def require_layers(model: Any, directory: Path) -> torch.nn.ModuleList:
    """Return a model's layers; raise `BadInput` if none can be run one after the other."""
    layers = layers_of(decoder_of(model))
    if layers is None or model.config.is_encoder_decoder:
        why = "has no list of layers" if layers is None else "is an encoder with a decoder"
        raise BadInput(
            f"{directory}: {type(model).__name__} of transformers {transformers_version()} {why}, "
            "and the reference runs models of one stack of layers; select the checks that need no "
            "reference (-k 'not fidelity and not replay')."
        )
    return layers


def transformers_version() -> str:
    """Return the installed version of transformers."""
    return version("transformers")


@contextmanager
def uncompiled(config: Any) -> Iterator[None]:
    """Have HF's classes run uncompiled, even after vLLM has served with them.

    vLLM's Transformers backend decorates the classes themselves, for the whole process. Models
    built from them afterwards ask for vLLM's current config, and are compiled unless that disables
    compilation.
    """
    if "vllm.model_executor.models.transformers.base" not in sys.modules:
        yield
        return
    from vllm.config import CompilationMode, set_current_vllm_config

    plain = SimpleNamespace(
        model_config=SimpleNamespace(hf_config=config),
        compilation_config=SimpleNamespace(mode=CompilationMode.NONE),
    )
    with set_current_vllm_config(plain):
        yield


@contextmanager
def _refused(directory: Path) -> Iterator[None]:
    """Turn any error that transformers raises about a config into a one-sentence `BadInput`."""
    try:
        yield
    except Exception as error:
        found = read_config(directory)
        architecture = next(iter(found.get("architectures") or ()), "no architecture")
        raise BadInput(
            f"{directory}: transformers {transformers_version()} cannot build {architecture} "
            f"(model_type '{found.get('model_type')}') from its config.json"
            f"{_its_part(error, found)}, so there is no reference for it; correct config.json by "
            "the base's, or install a release of transformers that has this architecture."
        ) from error


def _its_part(error: Exception, config: Mapping[str, Any]) -> str:
    """Return the config keys that an error mentions; "" if it mentions none."""
    words = set(re.findall(r"\w+", str(error)))
    keys = [key for key in config if key in words and key not in ("model_type", "architectures")]
    return f": its {', '.join(f'{key} = {config[key]!r}' for key in keys)}" if keys else ""


def _model_class(directory: Path, config: Any, task: Task, stored: StoredTensors) -> Any:
    """Return the HF class for a config and a task."""
    import transformers

    architecture = next(iter(config.architectures or ()), "")
    if (own := head_classes().get(architecture)) is not None:
        if architecture == COLBERT:
            config.colbert_dim = len(stored.read("linear.weight"))
        return own
    body = transformers.AutoModel._model_mapping.get(type(config), None)
    if task == EMBED and architecture == getattr(body, "__name__", None):
        return body
    automatic = {
        "token_classify": transformers.AutoModelForTokenClassification,
        "token_reward": transformers.AutoModelForTokenClassification,
        "sequence_reward": transformers.AutoModelForSequenceClassification,
    }.get(task, transformers.AutoModelForCausalLM)
    found = automatic._model_mapping.get(type(config), None)
    if found is None:
        raise BadInput(
            f"{directory}: transformers {transformers_version()} has no model of "
            f"'{config.model_type}' for {task} ({architecture or 'no architecture is named'}), so "
            "there is no reference for it; correct config.json, or select the checks that need no "
            "reference (-k 'not fidelity and not replay')."
        )
    kinds = {kind.__name__: kind for kind in (found if isinstance(found, tuple) else (found,))}
    return kinds.get(architecture, next(iter(kinds.values())))


def _needs_eager_attention(model: Any) -> bool:
    """Whether its attention has parts that HF's sdpa silently ignores: soft caps, sinks."""
    return any(
        hasattr(module, "sinks")
        or any("softcap" in name and value is not None for name, value in vars(module).items())
        for module in decoder_of(model).modules()
    )


def _compute_buffers(model: Any, device: torch.device) -> None:
    """Compute the buffers that no checkpoint stores, e.g. rotary frequencies, as HF does.

    Always on the CPU: powers and sines may differ in their last bits between devices.
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
