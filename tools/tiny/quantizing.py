"""Quantizing a tiny model by a recipe, with compressed-tensors' own compressors.

The same bytes on every machine: weights are rounded to nearest, and static activation scales come
from a file of measured ranges, because a forward pass is not the same to the last bit.
"""

import functools
import json
import re
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.compressors.format import infer_module_format
from compressed_tensors.config import CompressionFormat
from compressed_tensors.quantization import (
    QuantizationArgs,
    QuantizationConfig,
    preset_name_to_scheme,
)
from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam
from safetensors.torch import load_file, save_file

from quantgate.formats.groups import fused_with, group_of
from tiny.recipes import Group, Recipe

COPIED = (
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "generation_config.json",
)
FP8_KV_CACHE = {"num_bits": 8, "type": "float", "strategy": "tensor", "dynamic": False}
# The linears of decoders, and those of a BERT.
LINEAR = re.compile(r".*(_proj|\.(query|key|value|dense))\.weight")


def scheme_of(group: Group) -> Any:
    """Return a group as compressed-tensors' `QuantizationScheme`, its format filled in."""

    scheme = preset_name_to_scheme(group.preset, list(group.targets))
    if group.weights:
        scheme.weights = scheme.weights.model_copy(update=dict(group.weights))
    if group.inputs:
        scheme.input_activations = QuantizationArgs(**group.inputs)
    # vLLM takes W4AFP8 packed; compressed-tensors would write its codes as int8.
    inferred = infer_module_format(torch.nn.Linear, scheme)
    scheme.format = CompressionFormat("pack-quantized") if group.preset == "W4AFP8" else inferred
    return scheme


def quantize_linear(
    weight: torch.Tensor, scheme: Any, global_scale: torch.Tensor | None = None
) -> dict[str, torch.Tensor]:
    """Return the tensors that stand for one linear's weight [out, in], rounded to nearest.

    Scales are computed in float32 and stored in the weight's dtype; codes are taken against the
    stored scale, so that nothing depends on how a machine rounds intermediate results.
    """

    args = scheme.weights
    order = column_order(weight) if args.actorder else None
    columns = weight if order is None else weight[:, order]
    lowest, highest = ranges_of(columns.float(), args)
    scale, zero_point = calculate_qparams(lowest, highest, args, global_scale)
    state = {
        "weight": weight,
        "weight_scale": scale.to(weight.dtype),
        "weight_zero_point": zero_point.to(torch.int8),
    }
    if global_scale is not None:
        # E2M1 codes are taken in float32: the quotient of three numbers is not exact in bfloat16.
        state |= {"weight": weight.float(), "weight_scale": scale.float()}
        state["weight_global_scale"] = global_scale
    if order is not None:
        groups = torch.arange(len(order)) // args.group_size
        state["weight_g_idx"] = groups[order.argsort()].int()
    compressor = BaseCompressor.get_value_from_registry(str(scheme.format.value))
    return {name: t.contiguous() for name, t in compressor.compress(state, scheme).items()}


def ranges_of(weight: torch.Tensor, args: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the smallest and largest weight under each scale, shaped as the scales are."""
    rows, columns = weight.shape
    if args.strategy == "tensor":
        return weight.min(), weight.max()
    if args.strategy == "channel":
        parts, over = weight, (1,)
        return parts.amin(over, keepdim=True), parts.amax(over, keepdim=True)
    if args.strategy == "block":
        height, width = args.block_structure
        blocks = weight.view(rows // height, height, columns // width, width)
        return blocks.amin((1, 3)), blocks.amax((1, 3))
    groups = weight.view(rows, -1, args.group_size)
    return groups.amin(2), groups.amax(2)


def column_order(weight: torch.Tensor) -> torch.Tensor:
    """Return the columns [in] by falling sum of squares, which float64 adds up exactly."""
    return weight.double().square().sum(dim=0).argsort(descending=True, stable=True)


def global_scales(linears: Mapping[str, torch.Tensor], scheme: Any) -> dict[str, torch.Tensor]:
    """Return NVFP4's global scale of each linear, one for all that vLLM fuses; {} for others.

    vLLM takes the largest, and codes that were taken against a smaller one would no longer fit.
    """

    if scheme.weights.strategy != "tensor_group":
        return {}
    scales = {}
    for name in linears:
        fused = [linears[other] for other in fused_with(name) if other in linears]
        largest = torch.stack([weight.float().abs().max() for weight in fused]).max()
        scales[name] = generate_gparam(-largest, largest)
    return scales


def static_inputs(scheme: Any, lowest: float, highest: float) -> dict[str, torch.Tensor]:
    """Return the tensors of a linear's static input scale."""

    args = scheme.input_activations
    bounds = torch.tensor(lowest), torch.tensor(highest)
    if args.strategy == "tensor_group":
        return {"input_global_scale": generate_gparam(*bounds)}
    scale, zero_point = calculate_qparams(*bounds, args)
    tensors = {"input_scale": scale.to(torch.bfloat16)}
    return tensors if args.symmetric else {**tensors, "input_zero_point": zero_point.to(torch.int8)}


def kv_scales(ranges: Mapping[str, Any], layer: str) -> dict[str, torch.Tensor]:
    """Return the scales of an FP8 KV cache for one attention layer: amax / 448.

    Keys are cached after their rotation, which keeps the norm of each pair: a factor of sqrt(2).
    """

    scales = {}
    for kind, rotation in (("k", 2**0.5), ("v", 1.0)):
        lowest, highest = ranges["outputs"][f"{layer}.{kind}_proj"]
        amax = max(-lowest, highest) * rotation
        scales[f"{layer}.{kind}_scale"] = torch.tensor([amax / 448.0]).to(torch.bfloat16)
    return scales


@functools.cache
def _read_ranges(path: Path) -> dict[str, dict[str, tuple[float, float]]]:
    ranges: dict[str, dict[str, tuple[float, float]]] = json.loads(path.read_text())
    return ranges


def quantize_model(
    base: Path, recipe: Recipe, ranges: Path
) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Return a checkpoint's tensors, and the quantization_config that says what they are."""

    tensors = load_file(base / "model.safetensors")
    schemes = [scheme_of(group) for group in recipe.groups]
    for scheme in schemes:
        linears = {
            name.removesuffix(".weight"): tensor
            for name, tensor in tensors.items()
            if LINEAR.fullmatch(name) and is_target(name.removesuffix(".weight"), scheme, recipe)
        }
        scales = global_scales(linears, scheme)
        for linear, weight in linears.items():
            del tensors[f"{linear}.weight"]
            parts = quantize_linear(weight, scheme, scales.get(linear))
            if (inputs := scheme.input_activations) and inputs.dynamic is not True:
                parts |= static_inputs(scheme, *_read_ranges(ranges)["inputs"][linear])
            tensors |= {f"{linear}.{part}": value for part, value in parts.items()}
    if recipe.fp8_kv_cache:
        found = _read_ranges(ranges)
        layers = [name for name in found["outputs"] if name.endswith(".k_proj")]
        for layer in layers:
            tensors |= kv_scales(found, layer.removesuffix(".k_proj"))
    formats = {str(scheme.format.value) for scheme in schemes}
    config = QuantizationConfig(
        config_groups={f"group_{i}": scheme for i, scheme in enumerate(schemes)},
        ignore=list(recipe.ignore),
        format=formats.pop() if len(formats) == 1 else "mixed-precision",
        quantization_status="compressed",
        kv_cache_scheme=FP8_KV_CACHE if recipe.fp8_kv_cache else None,
    )
    return tensors, config.model_dump(mode="json")


def is_target(linear: str, scheme: Any, recipe: Recipe) -> bool:
    """Whether a scheme is a linear's: named by a target, and not ignored."""
    groups = {"group": {"targets": scheme.targets}}
    return (
        group_of(linear, "Linear", {"config_groups": groups, "ignore": recipe.ignore}) is not None
    )


def build(base: Path, target: Path, recipe: Recipe, ranges: Path | None = None) -> None:
    """Write the quantized checkpoint to `target`, which appears whole or not at all.

    `ranges`, as `calibration.calibrate` writes them: `ranges.json` beside the base's weights if not
    given.
    """

    # Compiled, the FP4 packing takes 15 s and a C++ compiler, for the same bytes.
    with torch.compiler.set_stance("force_eager"):
        tensors, quantization = quantize_model(base, recipe, ranges or base / "ranges.json")
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        whole = Path(scratch) / target.name
        whole.mkdir()
        save_file(dict(sorted(tensors.items())), whole / "model.safetensors", {"format": "pt"})
        write_config(base, whole, quantization)
        for name in COPIED:
            if (base / name).exists():
                shutil.copyfile(base / name, whole / name)
        shutil.rmtree(target, ignore_errors=True)
        whole.rename(target)


def write_config(base: Path, target: Path, quantization: dict[str, Any]) -> None:
    """Write the base's config.json with the quantization_config added."""
    config = json.loads((base / "config.json").read_text())
    config["quantization_config"] = {**quantization, "quant_method": "compressed-tensors"}
    (target / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
