"""Rules for checkpoints of NVIDIA's Model-Optimizer: its two configs, its formats, its exceptions.

Its scales are factors: a weight is its code times `weight_scale`, times `weight_scale_2` in NVFP4.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Iterator, Mapping
from typing import Any

from quantgate.audit.finding import Place, Rule
from quantgate.audit.inventory import Inventory

OWN = "hf_quant_config.json"
MIXED = "MIXED_PRECISION"
# What each format has beside a weight [out, in], with dtypes; of other formats nothing is known.
PARTS: Mapping[str, Mapping[str, str]] = {
    "FP8": {"weight": "F8_E4M3", "weight_scale": "F32", "input_scale": "F32"},
    "NVFP4": {
        "weight": "U8",
        "weight_scale": "F8_E4M3",
        "weight_scale_2": "F32",
        "input_scale": "F32",
    },
}
NVFP4_GROUP = 16
# The same setting in hf_quant_config.json and in config.json.
SAME = {"quant_algo": "quant_algo", "exclude_modules": "ignore", "group_size": "group_size"}


def _said(inventory: Inventory) -> dict[str, Any]:
    """Return Model-Optimizer's settings, from its own file if there is one; {} of others' work."""
    inner = inventory.document(OWN).get("quantization")
    return inner if isinstance(inner, dict) else _in_config(inventory)


def _in_config(inventory: Inventory) -> dict[str, Any]:
    said = inventory.config.get("quantization_config")
    is_own = isinstance(said, dict) and isinstance(said.get("quant_algo"), str)
    return said if isinstance(said, dict) and is_own else {}


def _format_of(said: Mapping[str, Any], name: str) -> str:
    """Return the format that a linear should have, "" if it should be whole."""
    algo = _upper(said.get("quant_algo"))
    if algo == MIXED:
        layers = said.get("quantized_layers")
        own = layers.get(name) if isinstance(layers, dict) else None
        return _upper(own.get("quant_algo")) if isinstance(own, dict) else ""
    return "" if _is_excluded(said, name) else algo


def _is_excluded(said: Mapping[str, Any], name: str) -> bool:
    patterns = said.get("exclude_modules", said.get("ignore"))
    return any(
        name == pattern or name.startswith(f"{pattern}.") or fnmatch.fnmatchcase(name, pattern)
        for pattern in (patterns if isinstance(patterns, list) else ())
        if isinstance(pattern, str)
    )


def _disagree(inventory: Inventory) -> Iterator[Place]:
    """Settings that the two configs give differently: which is used depends on the loader."""
    inner = inventory.document(OWN).get("quantization")
    in_config = _in_config(inventory)
    if not isinstance(inner, dict) or not in_config:
        return
    for key, other in SAME.items():
        if key not in inner or other not in in_config:
            continue
        own, theirs = inner[key], in_config[other]
        same = sorted(map(str, own)) == sorted(map(str, theirs)) if _lists(own, theirs) else None
        if same is None:
            same = _upper(own) == _upper(theirs) if isinstance(own, str) else own == theirs
        if not same:
            yield Place(key, repr(own)[:80], f"{theirs!r:.80}, as in config.json", OWN)


def _coverage(inventory: Inventory) -> Iterator[Place]:
    said = _said(inventory)
    if not said:
        return
    quantized = set(inventory.quantized)
    for name in inventory.linears:
        wanted = _format_of(said, name)
        if wanted and name not in quantized:
            dtype = inventory.modules[name]["weight"].dtype
            yield Place(name, f"is whole ({dtype})", f"{wanted}: nothing excludes it")
        elif not wanted and name in quantized:
            yield Place(name, "is quantized on disk", "a whole weight: the config excludes it")


def _tensors(inventory: Inventory) -> Iterator[Place]:
    """Tensors that a linear's format needs: missing, of another dtype, or of another shape."""
    said = _said(inventory)
    for name in inventory.quantized if said else ():
        wanted, parts = _format_of(said, name), inventory.modules[name]
        for part, dtype in PARTS.get(wanted, {}).items():
            entry = parts.get(part)
            if entry is None:
                yield Place(f"{name}.{part}", "is missing", f"{dtype}, of {wanted}")
            elif entry.dtype != dtype:
                yield Place(f"{name}.{part}", entry.dtype, f"{dtype}, of {wanted}")
        yield from _shapes(name, wanted, parts)


def _shapes(name: str, wanted: str, parts: Mapping[str, Any]) -> Iterator[Place]:
    weight, scale = parts.get("weight"), parts.get("weight_scale")
    if wanted == "NVFP4" and weight and scale and len(weight.shape) == 2:
        rows, columns = weight.shape[0], 2 * weight.shape[1]
        if scale.shape != (rows, columns // NVFP4_GROUP):
            expected = f"{[rows, columns // NVFP4_GROUP]}, a scale for each {NVFP4_GROUP} codes"
            yield Place(f"{name}.weight_scale", str(list(scale.shape)), expected)
    for part in ("weight_scale_2", "input_scale", *(["weight_scale"] if wanted == "FP8" else [])):
        entry = parts.get(part)
        if wanted in PARTS and entry is not None and entry.count != 1:
            yield Place(f"{name}.{part}", str(list(entry.shape)), "one number")


def _lists(*values: Any) -> bool:
    return all(isinstance(value, list) for value in values)


def _upper(value: Any) -> str:
    return value.upper() if isinstance(value, str) else ""


RULES = (
    Rule(
        "modelopt-disagrees",
        "error",
        "Engines read one or the other of Model-Optimizer's two configs, and must find the same.",
        "Model-Optimizer#868: a config that was edited by hand after the export",
        _disagree,
    ),
    Rule(
        "modelopt-coverage",
        "error",
        "vLLM makes a quantized layer of all that is not excluded, and a whole one of the rest.",
        "Model-Optimizer#1596, Model-Optimizer#2203, sglang#32736",
        _coverage,
    ),
    Rule(
        "modelopt-tensors",
        "error",
        "A scale that is missing, or of another shape, leaves a layer with what memory held.",
        "vllm#54444, Model-Optimizer#868: uninitialized or absent NVFP4 scales",
        _tensors,
    ),
)
