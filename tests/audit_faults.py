"""Faults that engine and reference read alike, each with what an audit must name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from audit_damages import (
    ACTORDER,
    FP8,
    INDEX,
    LAYER,
    NER,
    NORM,
    NVFP4,
    O_PROJ,
    Q_PROJ,
    UP_PROJ,
    W4A16,
    W8A8,
    another_shard,
    copied,
    drop,
    exchanged_special_tokens,
    orphan,
    permuted,
    put,
    relabelled,
    together,
    whole,
    with_index,
    without,
)
from raw_checkpoint import RawCheckpoint, Tensor, write_safetensors

DOWN, V_PROJ, K_PROJ = (
    f"{LAYER}mlp.down_proj",
    f"{LAYER}self_attn.v_proj",
    f"{LAYER}self_attn.k_proj",
)
OTHER = "model.layers.2."
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
Change = Callable[[RawCheckpoint], object]


def rows(name: str, change: Callable[[Any], Any]) -> Change:
    """Change a tensor's bytes [rows, bytes of a row]."""

    def do(tensor: Tensor) -> Tensor:
        changed = change(tensor.raw.reshape(tensor.shape[0], -1).copy())
        return Tensor(tensor.dtype, tensor.shape, np.ascontiguousarray(changed).reshape(-1))

    return put(name, do)


def rows_of(module: str, change: Callable[[Any], Any], *parts: str) -> Change:
    return together(*(rows(f"{module}.{part}", change) for part in parts))


def zero(first: int, last: int) -> Callable[[Any], Any]:
    def change(found: Any) -> Any:
        found[first:last] = 0
        return found

    return change


def exchanged(one: str, other: str) -> Change:
    return lambda c: c.exchange(one, other)


def layers_exchanged(checkpoint: RawCheckpoint) -> None:
    checkpoint.rename(LAYER, "aside.")
    checkpoint.rename(OTHER, LAYER)
    checkpoint.rename("aside.", OTHER)


def tensors_exchanged(one: str, other: str) -> Change:
    def do(checkpoint: RawCheckpoint) -> None:
        tensors = checkpoint.tensors
        tensors[one], tensors[other] = tensors[other], tensors[one]

    return do


def bytes_transposed(name: str) -> Change:
    """Transpose a square tensor with codes of one byte."""
    return put(
        name,
        lambda t: Tensor(t.dtype, t.shape, np.ascontiguousarray(t.raw.reshape(t.shape).T).ravel()),
    )


def half_of_another_layer(checkpoint: RawCheckpoint) -> None:
    """Scales of one shard come from another layer: no tensor is a copy."""
    name = "mlp.down_proj.weight_scale"
    mine, theirs = (checkpoint.tensors[f"{layer}{name}"] for layer in (LAYER, OTHER))
    half = len(mine.raw) // 2
    mixed = np.concatenate([mine.raw[:half], theirs.raw[half:]])
    checkpoint.tensors[f"{LAYER}{name}"] = Tensor(mine.dtype, mine.shape, mixed)


def in_half_precision(factor: float) -> Callable[[Tensor], Tensor]:
    def change(tensor: Tensor) -> Tensor:
        with np.errstate(over="ignore"):
            values = (tensor.floats * np.float32(factor)).astype("<f2")
        return Tensor("F16", tensor.shape, values.view(np.uint8))

    return change


def stale_shard(checkpoint: RawCheckpoint) -> None:
    with_index()(checkpoint)
    stale = {"model.norm.weight": checkpoint.tensors["model.norm.weight"].times(2)}
    write_safetensors(checkpoint.directory / "model-00002-of-00002.safetensors", stale)


def settings(**keys: Any) -> Change:
    return lambda c: c.config(**keys)


def lost(*keys: str) -> Change:
    return lambda c: c.edit("config.json", lambda said: [said.pop(key) for key in keys])


def edited(name: str, change: Callable[[dict[str, Any]], object]) -> Change:
    return lambda c: c.edit(name, change)


def ids_exchanged(tokenizer: dict[str, Any]) -> None:
    one, other = tokenizer["added_tokens"][:2]
    one["id"], other["id"] = other["id"], one["id"]


def in_order(tensor: Tensor) -> Tensor:
    groups = np.sort(tensor.raw.view("<i4"))
    return Tensor(tensor.dtype, tensor.shape, groups.view(np.uint8))


def nibbles_reversed(tensor: Tensor) -> Tensor:
    return Tensor(
        tensor.dtype, tensor.shape, ((tensor.raw >> 4) | (tensor.raw << 4)).view(np.uint8)
    )


def without_sign(tensor: Tensor) -> Tensor:
    return Tensor(tensor.dtype, tensor.shape, (tensor.raw & np.uint8(0x7F)).view(np.uint8))


def retied(checkpoint: RawCheckpoint) -> None:
    settings(tie_word_embeddings=True)(checkpoint)
    checkpoint.drop(HEAD)


@dataclass(frozen=True)
class Fault:
    """What is wrong with a checkpoint, and what the check must name."""

    id: str
    named: str
    do: Change
    checkpoint: str = W4A16
    both: Mapping[str, Any] = field(default_factory=dict)
    """Keys that checkpoint and base have in config.json before the fault."""


ROPE = {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0}
IN_FILES = (
    Fault("rope_theta x 1.1", "rope.rope_theta", settings(rope_theta=11000.0, rope_parameters={})),
    Fault("rope lost", "rope.rope_theta", lost("rope_parameters")),
    Fault(
        "rope scaling lost",
        "rope.factor",
        settings(rope_parameters={"rope_theta": 10000.0}),
        both={"rope_parameters": ROPE},
    ),
    Fault("norm epsilon", "rms_norm_eps", settings(rms_norm_eps=1e-6)),
    Fault("norm epsilon lost", "rms_norm_eps", lost("rms_norm_eps")),
    Fault("window lost", "sliding_window", lost("sliding_window"), both={"sliding_window": 128}),
    Fault("bias lost", "attention_bias", lost("attention_bias"), both={"attention_bias": True}),
    Fault("bias tensor", f"{Q_PROJ}.bias", copied("model.norm.weight", f"{Q_PROJ}.bias")),
    Fault("biases dropped", f"{Q_PROJ}.bias", drop(f"{Q_PROJ}.bias"), NER),
    Fault("GQA", "num_key_value_heads", settings(num_key_value_heads=4)),
    Fault("more and smaller heads", "head_dim", settings(num_attention_heads=8, head_dim=32)),
    Fault("activation", "hidden_act", settings(hidden_act="gelu")),
    Fault("a layer less", "num_hidden_layers", settings(num_hidden_layers=3)),
    Fault("tied", "tie_word_embeddings", settings(tie_word_embeddings=True)),
    Fault("tied, and no head", "tie_word_embeddings", retied),
    Fault("tie flag lost", "tie_word_embeddings", lost("tie_word_embeddings")),
    Fault("a norm is missing", NORM, drop(NORM)),
    Fault("the last norm is missing", "model.norm.weight", drop("model.norm.weight")),
    Fault("index without a tensor", "model.norm.weight", with_index("model.norm.weight")),
    Fault("stale tensor in another shard", "model.norm.weight", stale_shard),
    Fault("orphaned shard", "model-of-before.safetensors", orphan),
    Fault("shards without an index", INDEX, another_shard),
    Fault(
        "scales of another layer",
        f"{DOWN}.weight_scale",
        copied(f"{OTHER}mlp.down_proj.weight_scale", f"{DOWN}.weight_scale"),
    ),
    Fault(
        "scale overflows",
        f"{DOWN}.weight_scale",
        put(f"{DOWN}.weight_scale", in_half_precision(1e8)),
    ),
    Fault(
        "scale underflows",
        f"{DOWN}.weight_scale",
        put(f"{DOWN}.weight_scale", in_half_precision(1e-6)),
    ),
    Fault("FNUZ", f"{O_PROJ}.weight", put(f"{O_PROJ}.weight", relabelled("F8_E4M3FNUZ")), FP8),
    Fault(
        "global scales of q and k",
        ".weight_global_scale",
        put(f"{Q_PROJ}.weight_global_scale", lambda t: t.times(1.1)),
        NVFP4,
    ),
    Fault("a module left whole", O_PROJ, whole(O_PROJ)),
    Fault("tokenizer permuted", "vocab: ", permuted),
    Fault("special tokens exchanged", "<|bos|>", exchanged_special_tokens),
    Fault("ids of added tokens exchanged", "<|bos|>", edited("tokenizer.json", ids_exchanged)),
    Fault(
        "added token lost", "<|end|>", edited("tokenizer.json", lambda t: t["added_tokens"].pop())
    ),
    Fault(
        "added token no more special",
        "<|bos|>",
        edited("tokenizer.json", lambda t: t["added_tokens"][0].update(special=False)),
    ),
    Fault("tokenizer lost", "tokenizer.json", without("tokenizer.json")),
    Fault(
        "merges reversed",
        "model.merges",
        edited("tokenizer.json", lambda t: t["model"]["merges"].reverse()),
    ),
    Fault(
        "normalizer",
        "normalizer",
        edited("tokenizer.json", lambda t: t.update(normalizer={"type": "Lowercase"})),
    ),
    Fault(
        "post-processor lost",
        "post_processor",
        edited("tokenizer.json", lambda t: t.update(post_processor=None)),
    ),
    Fault(
        "tokenizer's class",
        "tokenizer_class",
        edited("tokenizer_config.json", lambda t: t.update(tokenizer_class="LlamaTokenizer")),
    ),
    Fault(
        "chat template",
        "chat_template",
        edited("tokenizer_config.json", lambda t: t.update(chat_template="{{ m }}")),
    ),
    Fault(
        "eos of generation",
        "eos_token_id",
        edited("generation_config.json", lambda g: g.update(eos_token_id=5)),
    ),
    Fault(
        "eos of generation lost",
        "eos_token_id",
        edited("generation_config.json", lambda g: g.pop("eos_token_id")),
    ),
    Fault("eos of config", "eos_token_id", settings(eos_token_id=3)),
    Fault("padding beyond the vocabulary", "pad_token_id", settings(pad_token_id=5000)),
)
IN_WEIGHTS = (
    Fault(
        "gate and up exchanged",
        f"{LAYER}mlp.gate_proj",
        exchanged(f"{LAYER}mlp.gate_proj", UP_PROJ),
    ),
    Fault("k and v exchanged", K_PROJ, exchanged(K_PROJ, V_PROJ)),
    Fault("q and o exchanged", Q_PROJ, exchanged(Q_PROJ, O_PROJ)),
    Fault("layers exchanged", LAYER, layers_exchanged),
    Fault(
        "final norm x 1.01", "model.norm.weight", put("model.norm.weight", lambda t: t.times(1.01))
    ),
    Fault(
        "norms of a layer exchanged",
        NORM,
        tensors_exchanged(NORM, f"{LAYER}post_attention_layernorm.weight"),
    ),
    Fault(
        "one channel of a norm",
        NORM,
        put(NORM, lambda t: t.with_value(7, 1.5 * float(t.floats[7]))),
    ),
    Fault("norm less one", NORM, put(NORM, lambda t: t.with_values(t.floats - 1))),
    Fault("scale x 1.02", DOWN, put(f"{DOWN}.weight_scale", lambda t: t.times(1.02))),
    Fault(
        "scales of the next group",
        DOWN,
        put(f"{DOWN}.weight_scale", lambda t: t.with_values(np.roll(t.floats, 1))),
    ),
    Fault("half of another layer's scales", DOWN, half_of_another_layer),
    Fault(
        "scales of another layer in 8 bits",
        DOWN,
        copied(f"{OTHER}mlp.down_proj.weight_scale", f"{DOWN}.weight_scale"),
        W8A8,
    ),
    Fault("act-order lost", O_PROJ, put(f"{O_PROJ}.weight_g_idx", in_order), ACTORDER),
    Fault("a row zeroed", V_PROJ, rows(f"{V_PROJ}.weight_packed", zero(3, 4))),
    Fault("a head zeroed", V_PROJ, rows(f"{V_PROJ}.weight_packed", zero(0, 64))),
    Fault("a head zeroed in FP8", V_PROJ, rows(f"{V_PROJ}.weight", zero(0, 64)), FP8),
    Fault(
        "heads exchanged",
        Q_PROJ,
        rows_of(Q_PROJ, lambda r: np.roll(r, 64, 0), "weight_packed", "weight_scale"),
    ),
    Fault("transposed", f"{O_PROJ}.weight", bytes_transposed(f"{O_PROJ}.weight"), W8A8),
    Fault("nibbles reversed", O_PROJ, put(f"{O_PROJ}.weight_packed", nibbles_reversed)),
    Fault("sign lost", O_PROJ, put(f"{O_PROJ}.weight", without_sign), FP8),
    Fault("embedding shifted by a row", EMBEDDING, rows(EMBEDDING, lambda r: np.roll(r, 1, 0))),
    Fault(
        "two rows of the embedding",
        EMBEDDING,
        rows(EMBEDDING, lambda r: r[[0, 1, 2, 4, 3, *range(5, len(r))]]),
    ),
    Fault("head shifted by a row", HEAD, rows(HEAD, lambda r: np.roll(r, 1, 0))),
    Fault("the embedding as head", HEAD, copied(EMBEDDING, HEAD)),
    Fault("bias x 1.5", f"{Q_PROJ}.bias", put(f"{Q_PROJ}.bias", lambda t: t.times(1.5)), NER),
)
