"""A config that a later transformers has written again is the same config; a changed one is not."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from audit_damages import ROOT
from transformers import AutoConfig, AutoTokenizer, GenerationConfig

from quantgate.audit.finding import Finding
from quantgate.audit.rules import audit

ROPE = {"rope_theta": 500000.0, "max_position_embeddings": 131072}
LLAMA3_ROPE = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
    "rope_type": "llama3",
}
USUAL = {
    "hidden_act": "silu",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_attention_heads": 32,
    "num_hidden_layers": 12,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-05,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "vocab_size": 32000,
    "initializer_range": 0.02,
    "attention_dropout": 0.0,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.43.1",
    "use_cache": True,
    "tie_word_embeddings": False,
}


def config(model_type: str, architecture: str, **more: Any) -> dict[str, Any]:
    return {**USUAL, "architectures": [architecture], "model_type": model_type, **more}


# What model cards of transformers 4 say: rope in three keys, defaults left out.
WRITTEN = {
    "llama-2": config("llama", "LlamaForCausalLM", rope_scaling=None, pretraining_tp=1),
    "llama-3": config("llama", "LlamaForCausalLM", rope_scaling=LLAMA3_ROPE, **ROPE),
    "mistral": config("mistral", "MistralForCausalLM", rope_theta=1e4, sliding_window=4096),
    "mixtral": config("mixtral", "MixtralForCausalLM", num_local_experts=8, rope_theta=1e6),
    "qwen2": config(
        "qwen2",
        "Qwen2ForCausalLM",
        max_window_layers=12,
        sliding_window=131072,
        use_sliding_window=False,
        rope_theta=1e6,
    ),
    "qwen2-slides": config(
        "qwen2",
        "Qwen2ForCausalLM",
        max_window_layers=4,
        sliding_window=4096,
        use_sliding_window=True,
        rope_theta=1e6,
    ),
    "qwen3-moe": config(
        "qwen3_moe",
        "Qwen3MoeForCausalLM",
        head_dim=128,
        num_experts=128,
        num_experts_per_tok=8,
        moe_intermediate_size=768,
        norm_topk_prob=True,
        rope_theta=1e6,
    ),
    "gemma-2": config(
        "gemma2",
        "Gemma2ForCausalLM",
        attn_logit_softcapping=50.0,
        final_logit_softcapping=30.0,
        head_dim=256,
        hidden_activation="gelu_pytorch_tanh",
        query_pre_attn_scalar=256,
        sliding_window=4096,
        rope_theta=10000.0,
    ),
    "gemma-3": {
        "architectures": ["Gemma3ForConditionalGeneration"],
        "model_type": "gemma3",
        "eos_token_id": [1, 106],
        "mm_tokens_per_image": 256,
        "text_config": {
            "hidden_size": 2560,
            "intermediate_size": 10240,
            "model_type": "gemma3_text",
            "num_hidden_layers": 34,
            "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
            "sliding_window": 1024,
        },
        "vision_config": {
            "hidden_size": 1152,
            "image_size": 896,
            "intermediate_size": 4304,
            "model_type": "siglip_vision_model",
            "num_attention_heads": 16,
            "num_hidden_layers": 27,
            "patch_size": 14,
        },
    },
    "phi-3": config(
        "phi3",
        "Phi3ForCausalLM",
        rope_theta=10000.0,
        rope_scaling=None,
        sliding_window=2047,
        original_max_position_embeddings=4096,
    ),
    "opt": {
        "architectures": ["OPTForCausalLM"],
        "model_type": "opt",
        "activation_function": "relu",
        "do_layer_norm_before": True,
        "ffn_dim": 3072,
        "hidden_size": 768,
        "num_attention_heads": 12,
        "num_hidden_layers": 12,
        "word_embed_proj_dim": 768,
        "bos_token_id": 2,
        "eos_token_id": 2,
    },
    "gpt-neox": {
        "architectures": ["GPTNeoXForCausalLM"],
        "model_type": "gpt_neox",
        "hidden_act": "gelu",
        "hidden_size": 512,
        "intermediate_size": 2048,
        "layer_norm_eps": 1e-05,
        "num_attention_heads": 8,
        "num_hidden_layers": 6,
        "rotary_emb_base": 10000,
        "rotary_pct": 0.25,
        "use_parallel_residual": True,
    },
    "granite": config(
        "granite",
        "GraniteForCausalLM",
        attention_multiplier=0.0078125,
        embedding_multiplier=12.0,
        logits_scaling=16.0,
        residual_multiplier=0.22,
        rope_theta=1e7,
    ),
}
CHANGES: dict[str, tuple[str, dict[str, Any]]] = {
    "num_key_value_heads": ("llama-2", {"num_key_value_heads": 4}),
    "head_dim": ("llama-3", {"head_dim": 64}),
    "rope.rope_type": ("llama-3", {"rope_parameters": {"rope_theta": 500000.0}}),
    "rope.rope_theta": ("llama-2", {"rope_parameters": {"rope_theta": 11000.0}}),
    "rms_norm_eps": ("llama-3", {"rms_norm_eps": 1e-6}),
    "sliding_window": ("mistral", {"sliding_window": None}),
    "layer_types": ("gemma-2", {"layer_types": ["full_attention"] * 12}),
    "attn_logit_softcapping": ("gemma-2", {"attn_logit_softcapping": None}),
    "norm_topk_prob": ("qwen3-moe", {"norm_topk_prob": False}),
    "num_local_experts": ("qwen3-moe", {"num_local_experts": 64}),
    "use_sliding_window": ("qwen2", {"use_sliding_window": True}),
    "attention_bias": ("gpt-neox", {"attention_bias": False}),
    "residual_multiplier": ("granite", {"residual_multiplier": 1.0}),
    "tie_word_embeddings": ("llama-3", {"tie_word_embeddings": True}),
    "enable_bias": ("opt", {"enable_bias": False}),
}


def rewritten(name: str, directory: Path) -> Path:
    """Return a directory with a base's config, and the same as transformers writes it now."""
    (directory / "base").mkdir()
    (directory / "base" / "config.json").write_text(json.dumps(WRITTEN[name]))
    AutoConfig.from_pretrained(directory / "base").save_pretrained(directory / "own")
    return directory


def differences(directory: Path) -> list[Finding]:
    findings = audit(directory / "own", directory / "base")
    return [finding for finding in findings if finding.rule == "config-differs"]


@pytest.mark.parametrize("name", WRITTEN)
def test_what_a_later_transformers_writes_is_the_same(name: str, tmp_path: Path) -> None:
    assert [str(finding) for finding in differences(rewritten(name, tmp_path))] == []


@pytest.mark.parametrize("key", CHANGES)
def test_a_change_in_what_was_written_again_is_named(key: str, tmp_path: Path) -> None:
    name, change = CHANGES[key]
    path = rewritten(name, tmp_path) / "own" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    assert key in [finding.name for finding in differences(tmp_path)]


@pytest.mark.parametrize("key", ["rms_norm_eps", "rope_parameters", "hidden_act"])
def test_a_key_that_was_lost_is_named(key: str, tmp_path: Path) -> None:
    path = rewritten("llama-3", tmp_path) / "own" / "config.json"
    said = json.loads(path.read_text())
    del said[key]
    path.write_text(json.dumps(said))
    found = differences(tmp_path)
    assert any(key.removesuffix("_parameters") in finding.name for finding in found), found


@pytest.mark.parametrize("base", ["fixtures/tiny/llama", "fixtures/tiny/qwen3"])
def test_a_tokenizer_that_was_written_again_is_the_same(base: str, tmp_path: Path) -> None:
    """transformers 5 names its generic class otherwise, and moves the chat template to a file."""
    AutoTokenizer.from_pretrained(ROOT / base).save_pretrained(tmp_path)
    GenerationConfig.from_pretrained(ROOT / base).save_pretrained(tmp_path)
    shutil.copy(ROOT / base / "config.json", tmp_path)
    assert {f.rule for f in audit(tmp_path, ROOT / base) if f.severity != "note"} <= {
        *("unreadable", "missing-beside-base")  # there are no weights
    }


def test_the_table_of_defaults_is_the_installed_transformers(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    import config_defaults

    assert json.loads(config_defaults.TARGET.read_text()) == config_defaults.table()
