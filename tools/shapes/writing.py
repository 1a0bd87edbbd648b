"""Writing a checkpoint of random weights one layer at a time."""

import dataclasses
import json
import math
import shutil
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from rich.progress import track
from safetensors.torch import save_file

from shapes.models import Shape
from tiny import TINY

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")
# Any byte is a code of these formats, but for NaN in E4M3: 0x7f and 0xff.
E4M3_NAN = 0x7F
FORMATS = ("none", "W4A16", "W8A8", "FP8_DYNAMIC")
GROUP = 128


def write_checkpoint(shape: Shape, scheme: str, target: Path, layers: int | None = None) -> None:
    """Write a checkpoint: one shard for each layer, and one for embeddings and head.

    With `layers`, only so many of them, which config.json says too.
    """
    shape = dataclasses.replace(shape, layers=layers or shape.layers)
    target.mkdir(parents=True)
    shards = {"model-outside.safetensors": outside(shape)}
    shards |= {f"model-{i:05}.safetensors": layer(shape, i, scheme) for i in range(shape.layers)}
    weight_map: dict[str, str] = {}
    for name, tensors in track(shards.items(), f"Writing {target.name}"):
        held = dict(tensors)
        save_file(held, target / name, {"format": "pt"})
        weight_map |= dict.fromkeys(held, name)
    index = {"metadata": {}, "weight_map": weight_map}
    (target / "model.safetensors.index.json").write_text(json.dumps(index))
    config = shape.config()
    if scheme != "none":
        config["quantization_config"] = quantization(scheme)
    (target / "config.json").write_text(json.dumps(config, indent=2))
    for name in TOKENIZER_FILES:
        shutil.copyfile(TINY / "llama" / name, target / name)


def quantization(scheme: str) -> dict[str, Any]:
    """Return the quantization_config of a preset."""
    from compressed_tensors.quantization import QuantizationConfig

    from tiny.quantizing import scheme_of
    from tiny.recipes import Group

    group = scheme_of(Group(scheme))
    config = QuantizationConfig(
        config_groups={"group_0": group},
        ignore=["lm_head", "re:.*mlp.gate$"],
        format=str(group.format.value),
        quantization_status="compressed",
    )
    return {**config.model_dump(mode="json"), "quant_method": "compressed-tensors"}


def outside(shape: Shape) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield embeddings, the last norm and the head, unless it is tied."""
    table = (shape.vocabulary, shape.hidden)
    yield "model.embed_tokens.weight", weights("model.embed_tokens.weight", table, 1.0)
    yield "model.norm.weight", ones((shape.hidden,))
    if not shape.tied:
        yield "lm_head.weight", weights("lm_head.weight", table, shape.hidden**-0.5)


def layer(shape: Shape, index: int, scheme: str) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield a layer's tensors."""
    prefix = f"model.layers.{index}"
    for name, size in shape.others():
        full = f"{prefix}.{name}"
        is_norm = len(size) == 1
        yield full, ones(size) if is_norm else weights(full, size, shape.hidden**-0.5)
    for name, outputs, inputs in shape.linears():
        yield from LINEARS[scheme](f"{prefix}.{name}", outputs, inputs)


# --- linears -------------------------------------------------------------------------------------


def _whole(name: str, outputs: int, inputs: int) -> Iterator[tuple[str, torch.Tensor]]:
    yield f"{name}.weight", weights(f"{name}.weight", (outputs, inputs), inputs**-0.5)


def _int4(name: str, outputs: int, inputs: int) -> Iterator[tuple[str, torch.Tensor]]:
    yield f"{name}.weight_packed", codes_of(name, (outputs, inputs // 8), torch.int32)
    scales = (outputs, inputs // GROUP)
    # Codes of -8 … 7 have an rms of 4.6.
    yield f"{name}.weight_scale", weights(f"{name}.scale", scales, inputs**-0.5 / 4.6, signed=False)
    yield f"{name}.weight_shape", torch.tensor([outputs, inputs])


def _int8(name: str, outputs: int, inputs: int) -> Iterator[tuple[str, torch.Tensor]]:
    yield f"{name}.weight", codes_of(name, (outputs, inputs), torch.int8)
    scale = weights(f"{name}.scale", (outputs, 1), inputs**-0.5 / 74, signed=False)
    yield f"{name}.weight_scale", scale  # the rms of -128 … 127


def _fp8(name: str, outputs: int, inputs: int) -> Iterator[tuple[str, torch.Tensor]]:
    codes = random_bytes(name, outputs * inputs)
    codes[(codes & E4M3_NAN) == E4M3_NAN] = 0
    weight = torch.from_numpy(codes).view(torch.float8_e4m3fn).view(outputs, inputs)
    yield f"{name}.weight", weight
    # The rms of all codes of E4M3.
    scale = weights(f"{name}.scale", (outputs, 1), inputs**-0.5 / 107, signed=False)
    yield f"{name}.weight_scale", scale


LINEARS = {"none": _whole, "W4A16": _int4, "W8A8": _int8, "FP8_DYNAMIC": _fp8}


# --- tensors -------------------------------------------------------------------------------------


def ones(size: tuple[int, ...]) -> torch.Tensor:
    """Return a tensor of ones in bfloat16."""
    return torch.ones(size, dtype=torch.bfloat16)


def weights(name: str, size: tuple[int, ...], rms: float, *, signed: bool = True) -> torch.Tensor:
    """Return random bfloat16 numbers whose magnitudes lie in one octave around `rms`.

    One exponent with random mantissas is as fast as memory; normal numbers take minutes for 8B.
    """
    exponent = round(math.log2(rms / 1.53)) + 127  # 1.53 is the rms of 1 … 2
    bits = random_bytes(name, 2 * math.prod(size)).view(np.uint16) & (0x807F if signed else 0x007F)
    return torch.from_numpy(bits | np.uint16(exponent << 7)).view(torch.bfloat16).view(size)


def random_bytes(name: str, count: int) -> NDArray[np.uint8]:
    """Return bytes [count] that depend on a tensor's name alone."""
    drawn = np.random.default_rng(zlib.crc32(name.encode())).bytes(count)
    return np.frombuffer(drawn, np.uint8).copy()


def codes_of(name: str, size: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """Return a tensor of random bytes."""
    count = math.prod(size) * dtype.itemsize
    return torch.from_numpy(random_bytes(name, count)).view(dtype).view(size)
