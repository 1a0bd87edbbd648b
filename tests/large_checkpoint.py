"""A checkpoint with the shape of a large one: headers and scales are real, weights are holes.

python tests/large_checkpoint.py 70B DIRECTORY [--format nvfp4]
"""

from __future__ import annotations

import argparse
import json
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

SHARD = 5_000_000_000
VOCABULARY = 128_256
SEED = 0
# Scales are parts of one random block, each from another place.
BLOCK = 1 << 24


@dataclass(frozen=True)
class Shape:
    """A Llama's sizes."""

    layers: int
    hidden: int
    inner: int
    heads: int
    kv_heads: int


SHAPES = {"8B": Shape(32, 4096, 14336, 32, 8), "70B": Shape(80, 8192, 28672, 64, 8)}
BITS = {"I32": 32, "BF16": 16, "I64": 64, "U8": 8, "F8_E4M3": 8, "F32": 32}
ARGS = {"dynamic": False, "symmetric": True, "actorder": None, "block_structure": None}
WEIGHTS = {
    "w4a16": {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 128, **ARGS},
    "nvfp4": {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16, **ARGS},
}
FORMATS = {"w4a16": "pack-quantized", "nvfp4": "nvfp4-pack-quantized"}


def write_large(directory: Path, shape: Shape, form: str = "w4a16") -> None:
    """Write a checkpoint of `form`, with an index, a config and a tokenizer."""
    directory.mkdir(parents=True, exist_ok=True)
    shards: list[dict[str, tuple[str, list[int]]]] = [{}]
    size = 0
    for name, tensor in _tensors(shape, form).items():
        size += _bytes(tensor)
        if size > SHARD:
            shards.append({})
            size = _bytes(tensor)
        shards[-1][name] = tensor
    block = _block(form)
    weight_map: dict[str, str] = {}
    for number, tensors in enumerate(shards, 1):
        file = f"model-{number:05}-of-{len(shards):05}.safetensors"
        weight_map |= dict.fromkeys(tensors, file)
        with (directory / file).open("wb") as stream:
            _write_shard(stream, tensors, block)
    _write_json(directory / "model.safetensors.index.json", {"weight_map": weight_map})
    _write_json(directory / "config.json", _config(shape, form))
    _write_json(directory / "tokenizer.json", _tokenizer())


def _tensors(shape: Shape, form: str) -> dict[str, tuple[str, list[int]]]:
    width = shape.hidden // shape.heads * shape.kv_heads
    linears = {
        **dict.fromkeys(("self_attn.q_proj", "self_attn.o_proj"), (shape.hidden, shape.hidden)),
        **dict.fromkeys(("self_attn.k_proj", "self_attn.v_proj"), (width, shape.hidden)),
        **dict.fromkeys(("mlp.gate_proj", "mlp.up_proj"), (shape.inner, shape.hidden)),
        "mlp.down_proj": (shape.hidden, shape.inner),
    }
    tensors = {
        "lm_head.weight": ("BF16", [VOCABULARY, shape.hidden]),
        "model.embed_tokens.weight": ("BF16", [VOCABULARY, shape.hidden]),
        "model.norm.weight": ("BF16", [shape.hidden]),
    }
    for layer in range(shape.layers):
        prefix = f"model.layers.{layer}"
        for norm in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"{prefix}.{norm}.weight"] = ("BF16", [shape.hidden])
        for name, (rows, columns) in linears.items():
            parts = _parts(form, rows, columns)
            tensors |= {f"{prefix}.{name}.{part}": tensor for part, tensor in parts.items()}
    return tensors


def _parts(form: str, rows: int, columns: int) -> dict[str, tuple[str, list[int]]]:
    if form == "nvfp4":
        return {
            "weight_packed": ("U8", [rows, columns // 2]),
            "weight_scale": ("F8_E4M3", [rows, columns // 16]),
            "weight_global_scale": ("F32", [1]),
        }
    return {
        "weight_packed": ("I32", [rows, columns // 8]),
        "weight_scale": ("BF16", [rows, columns // 128]),
        "weight_shape": ("I64", [2]),
    }


def _bytes(tensor: tuple[str, list[int]]) -> int:
    dtype, shape = tensor
    return int(np.prod(shape)) * BITS[dtype] // 8


def _block(form: str) -> bytes:
    """Return random scales: of 0.01 in bfloat16, of some size in E4M3."""
    random = np.random.default_rng(SEED)
    if form == "nvfp4":
        return random.integers(0x50, 0x7E, BLOCK, np.uint8).tobytes()
    values = random.lognormal(np.log(0.01), 0.2, BLOCK // 2).astype(np.float32)
    return (values.view(np.uint32) >> 16).astype("<u2").tobytes()


def _write_shard(stream: BinaryIO, tensors: dict[str, tuple[str, list[int]]], block: bytes) -> None:
    header: dict[str, Any] = {}
    place = 0
    for name, (dtype, shape) in tensors.items():
        size = _bytes((dtype, shape))
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [place, place + size]}
        place += size
    raw = json.dumps(header).encode()
    stream.write(len(raw).to_bytes(8, "little") + raw)
    begin = stream.tell()
    for name, described in header.items():
        first, last = described["data_offsets"]
        if name.endswith("weight_scale"):
            stream.seek(begin + first)
            _write_part(stream, block, 2 * (zlib.crc32(name.encode()) % (BLOCK // 4)), last - first)
        elif name.endswith("weight_global_scale"):
            stream.seek(begin + first)
            stream.write(np.float32(13107.2).tobytes())
    stream.truncate(begin + place)


def _write_part(stream: BinaryIO, block: bytes, start: int, size: int) -> None:
    while size:
        part = block[start : start + size]
        stream.write(part)
        size -= len(part)
        start = 0


def _config(shape: Shape, form: str) -> dict[str, Any]:
    group = {"targets": ["Linear"], "weights": WEIGHTS[form], "input_activations": None}
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": shape.hidden,
        "intermediate_size": shape.inner,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "vocab_size": VOCABULARY,
        "tie_word_embeddings": False,
        "quantization_config": {
            "quant_method": "compressed-tensors",
            "format": FORMATS[form],
            "config_groups": {"group_0": {**group, "format": FORMATS[form]}},
            "ignore": ["lm_head"],
        },
    }


def _tokenizer() -> dict[str, Any]:
    """As large as a tokenizer of such a model."""
    words = [f"token{number}" for number in range(VOCABULARY)]
    merges = [[word[:4], word[4:]] for word in words]
    vocabulary = {word: number for number, word in enumerate(words)}
    return {"model": {"type": "BPE", "vocab": vocabulary, "merges": merges}, "added_tokens": []}


def _write_json(path: Path, document: dict[str, Any]) -> None:
    path.write_text(json.dumps(document))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("size", choices=SHAPES)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--format", choices=FORMATS, default="w4a16")
    given = parser.parse_args()
    write_large(given.directory, SHAPES[given.size], given.format)
