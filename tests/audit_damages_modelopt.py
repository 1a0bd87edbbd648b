"""A checkpoint as Model-Optimizer writes them, and what breaks the rules for it."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from audit_damages import FP8, LAYER, NVFP4, O_PROJ, Damage, base_tensors, drop, put, together
from raw_checkpoint import RawCheckpoint, Tensor

OWN = "hf_quant_config.json"
# Its names, by those of compressed-tensors, whose global scales divide.
NAMES = {"weight_packed": "weight"}
FACTORS = {"weight_global_scale": "weight_scale_2", "input_global_scale": "input_scale"}


def as_modelopt(checkpoint: RawCheckpoint) -> None:
    """An NVFP4 or FP8 checkpoint of compressed-tensors, as Model-Optimizer would have saved it."""
    is_nvfp4 = any(name.endswith(".weight_packed") for name in checkpoint.tensors)
    tensors: dict[str, Tensor] = {}
    for name, tensor in checkpoint.tensors.items():
        module, _, part = name.rpartition(".")
        if part in FACTORS:
            tensors[f"{module}.{FACTORS[part]}"] = tensor.with_values(np.float32(1) / tensor.floats)
        elif part in ("weight_scale", "input_scale") and not is_nvfp4:
            values = tensor.floats.astype("<f4").view(np.uint8)
            tensors[name] = Tensor("F32", tensor.shape, values)
        else:
            tensors[f"{module}.{NAMES.get(part, part)}"] = tensor
    checkpoint.tensors = tensors
    algo = "NVFP4" if is_nvfp4 else "FP8"
    checkpoint.config(
        quantization_config={"quant_method": "modelopt", "quant_algo": algo, "ignore": ["lm_head"]}
    )
    own = {"quant_algo": algo, "exclude_modules": ["lm_head"], "kv_cache_quant_algo": None}
    checkpoint.edit(OWN, lambda said: said.update(quantization=own))


def own(**keys: object) -> Callable[[RawCheckpoint], object]:
    """Settings of hf_quant_config.json."""
    return lambda c: c.edit(OWN, lambda said: said["quantization"].update(keys))


def whole(checkpoint: RawCheckpoint) -> None:
    checkpoint.drop(*[name for name in checkpoint.tensors if name.startswith(f"{O_PROJ}.")])
    checkpoint.tensors[f"{O_PROJ}.weight"] = base_tensors()[f"{O_PROJ}.weight"]


def mixed(checkpoint: RawCheckpoint) -> None:
    """FP8 by name for one linear that is stored as NVFP4."""
    linears = [n.removesuffix(".weight") for n in checkpoint.tensors if n.endswith("_proj.weight")]
    layers = {name: {"quant_algo": "FP8" if name == O_PROJ else "NVFP4"} for name in linears}
    own(quant_algo="MIXED_PRECISION", quantized_layers=layers)(checkpoint)


def halved(tensor: Tensor) -> Tensor:
    rows, columns = tensor.shape
    return Tensor(tensor.dtype, (rows, columns // 2), tensor.raw[: len(tensor.raw) // 2])


def of(rule: str, name: str, do: Callable[[RawCheckpoint], object], source: str) -> Damage:
    return Damage(rule, name, together(as_modelopt, do), source)


DAMAGES_OF_MODELOPT = (
    Damage("weights-not-compared", "model.layers.0", as_modelopt, NVFP4),
    of("modelopt-disagrees", "quant_algo", own(quant_algo="FP8"), NVFP4),
    of("modelopt-disagrees", "exclude_modules", own(exclude_modules=["*head", "x"]), NVFP4),
    of("modelopt-coverage", O_PROJ, whole, NVFP4),
    of("modelopt-coverage", O_PROJ, own(exclude_modules=["lm_head", "*layers.1*"]), FP8),
    of("modelopt-tensors", f"{O_PROJ}.weight_scale_2", drop(f"{O_PROJ}.weight_scale_2"), NVFP4),
    of("modelopt-tensors", f"{O_PROJ}.input_scale", drop(f"{O_PROJ}.input_scale"), FP8),
    of("modelopt-tensors", f"{O_PROJ}.weight_scale", put(f"{O_PROJ}.weight_scale", halved), NVFP4),
    of("modelopt-tensors", f"{O_PROJ}.weight", mixed, NVFP4),
    of("sensitive-quantized", "lm_head", lambda c: c.exchange(f"{LAYER}mlp.gate_proj", "lm_head"),
       NVFP4),
)  # fmt: skip
