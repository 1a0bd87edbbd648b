"""What breaks the rules that compare a checkpoint with its base."""

from __future__ import annotations

from audit_damages import (
    FP8,
    LAYER,
    NER,
    NORM,
    O_PROJ,
    Q_PROJ,
    UP_PROJ,
    W8A8,
    Damage,
    copied,
    drop,
    exchanged_rows,
    exchanged_special_tokens,
    not_a_number,
    padded,
    permuted,
    put,
    without,
    written,
)
from raw_checkpoint import Tensor

DAMAGES_BESIDE_BASE = (
    Damage(
        "config-differs",
        "rope.rope_theta",
        lambda c: c.config(rope_parameters={"rope_theta": 11000.0, "rope_type": "default"}),
    ),
    Damage("config-differs", "rope.rope_theta", lambda c: c.config(rope_parameters=None)),
    Damage(
        "config-differs",
        "rope.factor",
        lambda c: c.config(
            rope_parameters={"rope_theta": 10000.0, "rope_type": "linear", "factor": 2.0}
        ),
    ),
    Damage("config-differs", "rms_norm_eps", lambda c: c.config(rms_norm_eps=1e-6)),
    Damage("config-differs", "eos_token_id", lambda c: c.config(eos_token_id=2)),
    Damage("config-differs", "num_key_value_heads", lambda c: c.config(num_key_value_heads=4)),
    Damage("config-differs", "sliding_window", lambda c: c.config(sliding_window=128)),
    Damage("dtype-differs", "dtype", lambda c: c.config(dtype="float16")),
    Damage(
        "generation-differs",
        "eos_token_id",
        lambda c: c.edit("generation_config.json", lambda g: g.update(eos_token_id=5)),
    ),
    Damage(
        "generation-differs",
        "generation_config.json",
        without("generation_config.json"),
    ),
    Damage("vocabulary-padded", "vocab_size", padded),
    Damage("vocabulary-differs", "vocab: ", permuted),
    Damage("vocabulary-differs", "tokenizer.json", without("tokenizer.json")),
    Damage("special-tokens-differ", "added_tokens: <|bos|>", exchanged_special_tokens),
    Damage(
        "special-tokens-differ",
        "eos_token",
        lambda c: c.edit("tokenizer_config.json", lambda t: t.update(eos_token="<|end|>")),
    ),
    Damage(
        "tokenizer-differs",
        "pre_tokenizer",
        lambda c: c.edit("tokenizer.json", lambda t: t.update(pre_tokenizer=None)),
    ),
    Damage(
        "tokenizer-differs",
        "model.merges",
        lambda c: c.edit("tokenizer.json", lambda t: t["model"]["merges"].pop()),
    ),
    Damage(
        "tokenizer-differs",
        "add_bos_token",
        lambda c: c.edit("tokenizer_config.json", lambda t: t.update(add_bos_token=True)),
    ),
    Damage(
        "chat-template-differs", "chat_template", written("chat_template.jinja", "{{ messages }}")
    ),
    Damage("missing-beside-base", "model.norm.weight", drop("model.norm.weight")),
    Damage("beyond-base", f"{Q_PROJ}.bias", copied("model.norm.weight", f"{Q_PROJ}.bias")),
    Damage("shape-beside-base", NORM, put(NORM, lambda t: Tensor(t.dtype, (128,), t.raw[:256]))),
    Damage(
        "weights-exchanged",
        f"{LAYER}mlp.gate_proj",
        lambda c: c.exchange(f"{LAYER}mlp.gate_proj", UP_PROJ),
    ),
    Damage(
        "weights-exchanged",
        Q_PROJ,
        lambda c: c.exchange(Q_PROJ, "model.layers.2.self_attn.q_proj"),
        FP8,
    ),
    Damage("weights-differ", Q_PROJ, exchanged_rows(Q_PROJ, 3, 70)),
    Damage(
        "weights-differ",
        "model.embed_tokens.weight",
        put("model.embed_tokens.weight", lambda t: t.with_value(70_000, 0.5)),
    ),
    Damage("weights-differ", "lm_head.weight", put("lm_head.weight", lambda t: t.times(1.01))),
    Damage(
        "weights-differ",
        O_PROJ,
        put(f"{O_PROJ}.weight_scale", lambda t: t.with_value(9, 2 * float(t.floats[9]))),
    ),
    Damage(
        "weight-scale",
        f"{O_PROJ}.weight_scale",
        put(f"{O_PROJ}.weight_scale", lambda t: t.times(1.02)),
    ),
    Damage(
        "weight-scale",
        f"{O_PROJ}.weight_scale",
        put(f"{O_PROJ}.weight_scale", lambda t: t.times(4)),
    ),
    Damage(
        "weight-scale",
        f"{UP_PROJ}.weight_scale",
        copied("model.layers.0.mlp.up_proj.weight_scale", f"{UP_PROJ}.weight_scale"),
        FP8,
    ),
    Damage(
        "weight-scale",
        f"{UP_PROJ}.weight_scale",
        copied("model.layers.0.mlp.up_proj.weight_scale", f"{UP_PROJ}.weight_scale"),
        W8A8,
    ),
    Damage("weight-not-finite", f"{O_PROJ}.weight", put(f"{O_PROJ}.weight", not_a_number), FP8),
    Damage("norm-differs", "model.norm.weight", put("model.norm.weight", lambda t: t.times(1.01))),
    Damage("norm-differs", NORM, put(NORM, lambda t: t.times(1.01))),
    Damage("norm-differs", NORM, put(NORM, lambda t: t.with_value(3, 2.0)), W8A8),
    Damage("tensor-differs", f"{Q_PROJ}.bias", put(f"{Q_PROJ}.bias", lambda t: t.times(1.5)), NER),
    Damage("calibration-no-op", O_PROJ, written("recipe.yaml", "GPTQModifier:\n  scheme: W4A16\n")),
)
