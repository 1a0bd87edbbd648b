"""Names of compressed-tensors schemes, following llm-compressor's presets."""

from collections.abc import Mapping
from typing import Any

UNQUANTIZED = "none"


def scheme_name(quantization_config: Mapping[str, Any] | None) -> str:
    """Return the scheme of a `quantization_config` in `config.json`, e.g. "W4A16".

    Several config groups are joined with "+", sorted by group name; an FP8 KV cache adds
    "+KV_FP8". A model without a `quantization_config` is "none".
    """
    if not quantization_config:
        return UNQUANTIZED
    groups = quantization_config.get("config_groups") or {}
    names = dict.fromkeys(_group_name(groups[key]) for key in sorted(groups))
    if quantization_config.get("kv_cache_scheme"):
        names["KV_FP8"] = None
    return "+".join(names) or UNQUANTIZED


def _group_name(group: Mapping[str, Any]) -> str:
    weights, inputs = group.get("weights") or {}, group.get("input_activations") or {}
    if weights.get("type") == "float":
        return _float_name(weights, inputs)
    input_bits = inputs.get("num_bits", 16)
    input_kind = "FP" if inputs.get("type") == "float" else "A"
    name = f"W{weights.get('num_bits')}{'AFP' if input_kind == 'FP' else 'A'}{input_bits}"
    if inputs and inputs.get("type") == "int" and not inputs.get("dynamic"):
        name += "_STATIC"
    if weights.get("symmetric") is False:
        name += "_ASYM"
    if weights.get("actorder"):
        name += f"_{str(weights['actorder']).upper()}_ACTORDER"
    return name


def _float_name(weights: Mapping[str, Any], inputs: Mapping[str, Any]) -> str:
    strategy, group_size = weights.get("strategy"), weights.get("group_size")
    suffix = "" if inputs else "A16"
    if weights.get("num_bits") == 4:
        return ("NVFP4" if group_size == 16 else "MXFP4") + suffix
    if group_size == 32:
        return "MXFP8" + suffix
    if strategy == "block":
        return "FP8_BLOCK"
    return "FP8" + (suffix or ("_DYNAMIC" if inputs.get("dynamic") else ""))


def quantizes_activations(quantization_config: Mapping[str, Any] | None) -> bool:
    """Whether vLLM quantizes inputs or the KV cache, which makes free-running scores chaotic.

    It does not for MXFP8 and MXFP4: its emulation and its Marlin kernels keep their inputs.
    """
    config = quantization_config or {}
    groups = (config.get("config_groups") or {}).values()
    inputs = [group["input_activations"] for group in groups if group.get("input_activations")]
    return any(not is_mx(args) for args in inputs) or bool(config.get("kv_cache_scheme"))


def is_mx(args: Mapping[str, Any]) -> bool:
    """Whether quantization arguments describe an MX format: floats with group size 32."""
    return args.get("type") == "float" and args.get("group_size") == 32
