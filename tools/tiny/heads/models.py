"""The models that heads are trained on, their bodies the tiny Llama's or new."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from transformers import BertConfig, Qwen2Config

from tiny import TINY
from tiny.tokenizer import PAD_ID

BASE = TINY / "llama"

# What a Qwen2's config has in common with a Llama's.
SHARED_WITH_LLAMA = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "max_position_embeddings",
    "rms_norm_eps",
    "rope_parameters",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
)


def qwen2(kind: Any, labels: Sequence[str], body: Path = BASE) -> Any:
    """Return a Qwen2 with a head, its body the tiny Llama's or another Qwen2's."""
    config = json.loads((body / "config.json").read_text())
    shared = {name: config[name] for name in SHARED_WITH_LLAMA}
    model = kind(Qwen2Config(**shared, **labelled(labels)))
    stored = load_file(body / "model.safetensors")
    found = {
        name.removeprefix("model."): tensor.float()
        for name, tensor in stored.items()
        if name.startswith("model.")
    }
    missing, _ = model.model.load_state_dict(found, strict=False)
    assert all(name.endswith("_proj.bias") for name in missing), missing  # a Llama has none
    return model


def bert(kind: Any, **more: Any) -> Any:
    """Return a small BERT with a head, untrained: it reads both ways, as no Llama does."""
    vocabulary = json.loads((BASE / "config.json").read_text())["vocab_size"]
    return kind(
        BertConfig(
            vocab_size=vocabulary,
            hidden_size=128,
            intermediate_size=256,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=1024,
            type_vocab_size=2,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
            pad_token_id=PAD_ID,
            **more,
        )
    )


def labelled(labels: Sequence[str]) -> dict[str, Any]:
    """Return what a config says of a head's labels."""
    return {"id2label": dict(enumerate(labels)), "label2id": {n: i for i, n in enumerate(labels)}}
