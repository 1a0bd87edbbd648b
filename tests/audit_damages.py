"""What breaks each rule of the audit: a checkpoint, what is done to it, and the name found."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from raw_checkpoint import RawCheckpoint, Tensor, write_safetensors

from quantgate.audit.headers import read_shard

ROOT = Path(__file__).resolve().parent.parent
LAYER = "model.layers.1."
INDEX = "model.safetensors.index.json"

W4A16, ASYM, ACTORDER = "tiny-llama-w4a16", "tiny-llama-w4a16-asym", "tiny-llama-w4a16-actorder"
FP8, FP8_KV, FP8_DYNAMIC = "tiny-llama-fp8", "tiny-llama-fp8-kv", "tiny-llama-fp8-dynamic"
NVFP4, W8A8, NER = "tiny-llama-nvfp4", "tiny-llama-w8a8", "tiny-ner-qwen2-w8a8"


@dataclass(frozen=True)
class Damage:
    """What breaks one rule, and the name that is found."""

    rule: str
    name: str
    do: Callable[[RawCheckpoint], object]
    checkpoint: str = W4A16


def together(*damages: Callable[[RawCheckpoint], object]) -> Callable[[RawCheckpoint], object]:
    def do(checkpoint: RawCheckpoint) -> None:
        for damage in damages:
            damage(checkpoint)

    return do


def drop(*names: str) -> Callable[[RawCheckpoint], object]:
    return lambda c: c.drop(*names)


def put(name: str, change: Callable[[Tensor], Tensor]) -> Callable[[RawCheckpoint], object]:
    def do(checkpoint: RawCheckpoint) -> None:
        checkpoint.tensors[name] = change(checkpoint.tensors[name])

    return do


def put_all(end: str, change: Callable[[Tensor], Tensor]) -> Callable[[RawCheckpoint], object]:
    def do(checkpoint: RawCheckpoint) -> None:
        for name in checkpoint.tensors:
            if name.endswith(end):
                checkpoint.tensors[name] = change(checkpoint.tensors[name])

    return do


def copied(source: str, target: str) -> Callable[[RawCheckpoint], object]:
    def do(checkpoint: RawCheckpoint) -> None:
        checkpoint.tensors[target] = checkpoint.tensors[source]

    return do


def written(name: str, text: str) -> Callable[[RawCheckpoint], object]:
    return lambda c: (c.directory / name).write_text(text)


def without(name: str) -> Callable[[RawCheckpoint], object]:
    return lambda c: (c.directory / name).unlink()


def base_tensors() -> dict[str, Tensor]:
    entries = read_shard(ROOT / "fixtures" / "tiny" / "llama" / "model.safetensors").entries
    return {name: Tensor(e.dtype, e.shape, e.bytes()) for name, e in entries.items()}


def with_index(leave_out: str = "", total: int | None = None) -> Callable[[RawCheckpoint], object]:
    def do(checkpoint: RawCheckpoint) -> None:
        names = [name for name in checkpoint.tensors if name != leave_out]
        metadata = {} if total is None else {"total_size": total}
        index = {"metadata": metadata, "weight_map": dict.fromkeys(names, "model.safetensors")}
        (checkpoint.directory / INDEX).write_text(json.dumps(index))

    return do


def another_shard(checkpoint: RawCheckpoint) -> None:
    norm = {"model.norm.weight": checkpoint.tensors["model.norm.weight"]}
    write_safetensors(checkpoint.directory / "model-of-before.safetensors", norm)


def orphan(checkpoint: RawCheckpoint) -> None:
    with_index()(checkpoint)
    another_shard(checkpoint)


def whole(module: str) -> Callable[[RawCheckpoint], object]:
    """A module's codes replaced by the base's weight."""

    def do(checkpoint: RawCheckpoint) -> None:
        checkpoint.drop(*[n for n in checkpoint.tensors if n.startswith(f"{module}.")])
        checkpoint.tensors[f"{module}.weight"] = base_tensors()[f"{module}.weight"]

    return do


def unquantized(checkpoint: RawCheckpoint) -> None:
    checkpoint.tensors = base_tensors()


def experts(checkpoint: RawCheckpoint) -> None:
    for number in (0, 1):
        checkpoint.rename(f"model.layers.{number}.mlp.", f"model.layers.0.mlp.experts.{number}.")
    one = "model.layers.0.mlp.experts.1.up_proj"
    weight = base_tensors()["model.layers.0.mlp.up_proj.weight"]
    checkpoint.drop(*[name for name in checkpoint.tensors if name.startswith(f"{one}.")])
    checkpoint.tensors[f"{one}.weight"] = weight


def modelopt(checkpoint: RawCheckpoint) -> None:
    checkpoint.config(quantization_config={"quant_method": "modelopt", "quant_algo": "NVFP4"})


def gptq(checkpoint: RawCheckpoint) -> None:
    """Symmetric zero points of 8 in the format that stores them less one."""
    checkpoint.config(quantization_config={"quant_method": "gptq", "bits": 4, "sym": True})
    zeros = np.full(32, 0x88888888, "<u4").view(np.uint8)
    checkpoint.tensors[f"{LAYER}mlp.up_proj.qzeros"] = Tensor("I32", (2, 16), zeros)


def far_zero_points(checkpoint: RawCheckpoint) -> None:
    name = f"{LAYER}mlp.up_proj.weight_zero_point"
    shape = checkpoint.tensors[f"{LAYER}mlp.up_proj.weight_scale"].shape
    values = np.full(shape, 100, np.int8)
    checkpoint.tensors[name] = Tensor("I8", shape, values.view(np.uint8).reshape(-1))


def padded(checkpoint: RawCheckpoint) -> None:
    checkpoint.config(vocab_size=1088)
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        old = checkpoint.tensors[name]
        more = np.zeros(64 * old.shape[1] * 2, np.uint8)
        checkpoint.tensors[name] = Tensor(old.dtype, (1088, 256), np.concatenate([old.raw, more]))


def permuted(checkpoint: RawCheckpoint) -> None:
    def change(tokenizer: dict[str, dict[str, dict[str, int]]]) -> None:
        vocabulary = tokenizer["model"]["vocab"]
        ordinary = [token for token, i in vocabulary.items() if i > 300]
        ids = [vocabulary[token] for token in ordinary]
        vocabulary.update(zip(ordinary, ids[1:] + ids[:1], strict=True))

    checkpoint.edit("tokenizer.json", change)


def exchanged_special_tokens(checkpoint: RawCheckpoint) -> None:
    def change(tokenizer: dict[str, list[dict[str, object]]]) -> None:
        first, second = tokenizer["added_tokens"][:2]
        first["content"], second["content"] = second["content"], first["content"]

    checkpoint.edit("tokenizer.json", change)


def inverted(tensor: Tensor) -> Tensor:
    return tensor.with_values(np.reciprocal(tensor.floats))


def relabelled(dtype: str) -> Callable[[Tensor], Tensor]:
    return lambda tensor: Tensor(dtype, tensor.shape, tensor.raw)


def transposed(tensor: Tensor) -> Tensor:
    return Tensor(tensor.dtype, tensor.shape[::-1], tensor.raw)


def exchanged_rows(name: str, one: int, other: int) -> Callable[[RawCheckpoint], object]:
    def do(checkpoint: RawCheckpoint) -> None:
        for part in ("weight_packed", "weight_scale"):
            tensor = checkpoint.tensors[f"{name}.{part}"]
            rows = tensor.raw.reshape(tensor.shape[0], -1).copy()
            rows[[one, other]] = rows[[other, one]]
            changed = Tensor(tensor.dtype, tensor.shape, rows.reshape(-1))
            checkpoint.tensors[f"{name}.{part}"] = changed

    return do


def not_a_number(tensor: Tensor) -> Tensor:
    raw = tensor.raw.copy()
    raw[5] = 0x7F
    return Tensor(tensor.dtype, tensor.shape, raw)


O_PROJ, UP_PROJ, Q_PROJ = (
    f"{LAYER}self_attn.o_proj",
    f"{LAYER}mlp.up_proj",
    f"{LAYER}self_attn.q_proj",
)
NORM = f"{LAYER}input_layernorm.weight"

DAMAGES = (
    Damage("unreadable", "config.json", without("config.json")),
    Damage("unreadable", "config.json", written("config.json", "{")),
    Damage("unreadable", "config_groups", lambda c: c.quantization(config_groups=7)),
    Damage("tensor-twice", "model.norm.weight", another_shard),
    Damage("index", "model.norm.weight", with_index(leave_out="model.norm.weight")),
    Damage("index", INDEX, another_shard),
    Damage("shard-orphan", "model-of-before.safetensors", orphan),
    Damage("total-size", "metadata.total_size", with_index(total=1)),
    Damage("nothing-quantized", "quantization_config", unquantized),
    Damage(
        "no-quantization-config",
        "model.layers.0",
        lambda c: c.edit("config.json", lambda config: config.pop("quantization_config")),
    ),
    Damage("not-quantized", O_PROJ, whole(O_PROJ)),
    Damage("quantized-beyond", O_PROJ, lambda c: c.quantization(ignore=["lm_head", O_PROJ])),
    Damage("pattern-invalid", "ignore: re:(", lambda c: c.quantization(ignore=["lm_head", "re:("])),
    Damage(
        "pattern-invalid",
        "ignore: re:(a+)+$",
        lambda c: c.quantization(ignore=["lm_head", "re:(a+)+$"]),
    ),
    Damage("target-unused", "re:.*w1$", lambda c: c.group(targets=["Linear", "re:.*w1$"])),
    Damage(
        "ignore-unused", "re:.*visual", lambda c: c.quantization(ignore=["lm_head", "re:.*visual"])
    ),
    Damage("libraries-differ", f"{LAYER}mlp.down_proj", lambda c: c.group(targets=["linear"])),
    Damage(
        "fused-mixed",
        f"{LAYER}self_attn.qkv_proj",
        lambda c: c.quantization(ignore=["lm_head", Q_PROJ]),
    ),
    Damage("experts-mixed", "model.layers.0.mlp.experts", experts),
    Damage("sensitive-quantized", "score", lambda c: c.rename(O_PROJ, "score")),
    Damage(
        "sensitive-quantized", "model.visual", lambda c: c.rename(O_PROJ, "model.visual.merger")
    ),
    Damage("layer-uneven", f"{LAYER}input_layernorm", drop(NORM)),
    Damage("layer-count", "num_hidden_layers", lambda c: c.config(num_hidden_layers=5)),
    Damage("layer-count", "model.layers.3", lambda c: c.config(num_hidden_layers=3)),
    Damage("precision-counts", "linears", lambda c: None),
    Damage("tensor-missing", f"{O_PROJ}.weight_scale", drop(f"{O_PROJ}.weight_scale")),
    Damage(
        "tensor-missing",
        f"{O_PROJ}.weight_global_scale",
        drop(f"{O_PROJ}.weight_global_scale"),
        NVFP4,
    ),
    Damage("input-scale-missing", f"{O_PROJ}.input_scale", drop(f"{O_PROJ}.input_scale"), FP8),
    Damage(
        "tensor-unexpected",
        f"{O_PROJ}.weight_global_scale",
        copied("model.norm.weight", f"{O_PROJ}.weight_global_scale"),
    ),
    Damage("scale-orphan", f"{O_PROJ}.weight_scale", drop(f"{O_PROJ}.weight"), FP8),
    Damage(
        "tensor-dtype",
        f"{O_PROJ}.weight_scale",
        put(f"{O_PROJ}.weight_scale", relabelled("U8")),
        NVFP4,
    ),
    Damage("tensor-shape", f"{O_PROJ}.weight_scale", put(f"{O_PROJ}.weight_scale", transposed)),
    Damage("format-bytes", "model.layers.0", modelopt, FP8_DYNAMIC),
    Damage("format-unknown", "group_0.format", lambda c: c.group(format="marlin-24")),
    Damage("fp8-kind", f"{O_PROJ}.weight", put(f"{O_PROJ}.weight", relabelled("F8_E4M3FNUZ")), FP8),
    Damage(
        "fused-on-disk",
        f"{LAYER}self_attn.qkv_proj",
        lambda c: c.rename(Q_PROJ, f"{LAYER}self_attn.qkv_proj"),
        FP8,
    ),
    Damage(
        "scale-not-finite",
        f"{O_PROJ}.weight_scale",
        put(f"{O_PROJ}.weight_scale", lambda t: t.with_value(3, np.inf)),
    ),
    Damage(
        "scale-not-finite",
        f"{O_PROJ}.weight_scale",
        put(f"{O_PROJ}.weight_scale", not_a_number),
        NVFP4,
    ),
    Damage(
        "scale-not-positive",
        f"{O_PROJ}.weight_scale",
        put(f"{O_PROJ}.weight_scale", lambda t: t.with_value(3, 0.0)),
    ),
    Damage(
        "scale-not-positive",
        f"{O_PROJ}.weight_scale",
        put(f"{O_PROJ}.weight_scale", lambda t: t.times(-1)),
    ),
    Damage(
        "scale-outlier",
        f"{O_PROJ}.weight_scale",
        put(f"{O_PROJ}.weight_scale", lambda t: t.times(100)),
    ),
    Damage("weight-magnitude", O_PROJ, put(f"{O_PROJ}.weight_global_scale", inverted), NVFP4),
    Damage(
        "fp16-overflow",
        O_PROJ,
        together(
            lambda c: c.config(dtype="float16"),
            put(f"{O_PROJ}.weight_scale", lambda t: t.times(1e8)),
        ),
    ),
    Damage(
        "scale-copied",
        f"{UP_PROJ}.weight_scale",
        copied("model.layers.0.mlp.up_proj.weight_scale", f"{UP_PROJ}.weight_scale"),
    ),
    Damage(
        "fused-scales",
        ".weight_global_scale",
        put(f"{Q_PROJ}.weight_global_scale", lambda t: t.times(1.1)),
        NVFP4,
    ),
    Damage(
        "input-scale-default",
        "input_scale",
        put_all(".input_scale", lambda t: t.with_value(0, 1.0)),
        FP8,
    ),
    Damage(
        "kv-scale-missing", f"{LAYER}self_attn.k_scale", drop(f"{LAYER}self_attn.k_scale"), FP8_KV
    ),
    Damage(
        "kv-scale-default",
        "k_scale",
        together(
            *(put_all(end, lambda t: t.with_value(0, 1.0)) for end in (".k_scale", ".v_scale"))
        ),
        FP8_KV,
    ),
    Damage("kv-scale-unused", "k_scale", lambda c: c.quantization(kv_cache_scheme=None), FP8_KV),
    Damage(
        "zero-point-missing",
        f"{O_PROJ}.weight_zero_point",
        drop(f"{O_PROJ}.weight_zero_point"),
        ASYM,
    ),
    Damage("zero-point-range", f"{UP_PROJ}.weight_zero_point", far_zero_points, ASYM),
    Damage(
        "group-index",
        f"{O_PROJ}.weight_g_idx",
        put(
            f"{O_PROJ}.weight_g_idx",
            lambda t: Tensor("I32", t.shape, np.full(t.shape, 99, "<i4").view(np.uint8)),
        ),
        ACTORDER,
    ),
    Damage("gptq-zero-point", f"{UP_PROJ}.qzeros", gptq),
    Damage("vocabulary", "vocab_size", lambda c: c.config(vocab_size=1000)),
    Damage("config-sizes", Q_PROJ, lambda c: c.config(head_dim=128)),
    Damage("tie-contradicted", "tie_word_embeddings", lambda c: c.config(tie_word_embeddings=True)),
    Damage("tie-contradicted", "lm_head.weight", drop("lm_head.weight")),
    Damage(
        "group-indivisible",
        O_PROJ,
        lambda c: c.edit(
            "config.json",
            lambda g: g["quantization_config"]["config_groups"]["group_0"]["weights"].update(
                group_size=96
            ),
        ),
    ),
    Damage("tensor-parallel", "tensor parallelism", lambda c: None),
    Damage("version-newer", "version", lambda c: c.quantization(version="99.1.0")),
    Damage("tokenizer-missing", "tokenizer.json", without("tokenizer.json")),
    Damage(
        "token-ids",
        "bos_token_id",
        together(lambda c: c.config(bos_token_id=7), without("generation_config.json")),
    ),
    Damage(
        "tokens-beyond",
        "vocab_size",
        lambda c: c.edit("tokenizer.json", lambda t: t["added_tokens"][5].update(id=5000)),
    ),
    Damage("pickle", "training_args.bin", written("training_args.bin", "")),
    Damage("remote-code", "auto_map", lambda c: c.config(auto_map={"AutoModel": "modeling.Model"})),
    Damage("remote-code", "modeling.py", written("modeling.py", "")),
    Damage(
        "symlink-outside",
        "secrets.json",
        lambda c: (c.directory / "secrets.json").symlink_to("/etc/hostname"),
    ),
    Damage("recipe-differs", "quantization_config", written("recipe.yaml", "a:\n  scheme: W8A8\n")),
)
