"""Commonly quantized architectures in small sizes, with their special features switched on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from quantgate.subject.task import GENERATE, Task

VOCABULARY = 512


@dataclass(frozen=True)
class Architecture:
    """One architecture in a small size."""

    config: str
    """The name of its config class in transformers."""
    options: Mapping[str, Any]
    task: Task = GENERATE
    ignore: tuple[str, ...] = ()
    """Modules besides the head that stay unquantized, as in a quantization_config's `ignore`."""
    notes: str = ""
    """The features that are switched on."""
    without: tuple[str, ...] = field(default=())
    """Options of `DECODER` that do not apply to it."""
    more_formats: tuple[str, ...] = ()
    """Formats that it is tried in besides those that all are."""
    known_fault: str = ""
    """Why it fails, if known."""


DECODER: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
SLIDING_THEN_FULL = ["sliding_attention", "full_attention", "sliding_attention", "full_attention"]
# torch.ops._C.rotary_embedding, called with both shapes, gives other values for every head; with
# queries and keys flattened before it, these models pass.
ROTARY_FAULT = (
    "vLLM's rotary kernel for CPUs reads queries and keys [tokens, heads, width], as this model "
    "gives them, as if they were [tokens, width]"
)
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 128}
NO_KV = ("num_key_value_heads",)
ENCODER: dict[str, Any] = {"num_labels": 7, "type_vocab_size": 2}
# What recipes for mixtures of experts keep.
ROUTERS = (r"re:.*\.(gate|router|shared_expert_gate)$",)
EXPERTS_KEPT = (*ROUTERS, r"re:.*\.experts\..*")

ARCHITECTURES: dict[str, Architecture] = {
    "llama3": Architecture(
        "LlamaConfig",
        {
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 10000.0,
                "factor": 4.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 64,
            }
        },
        notes="Llama 3's rope scaling",
    ),
    "mistral": Architecture("MistralConfig", {"sliding_window": 32}, notes="sliding window"),
    "gemma2": Architecture(
        "Gemma2Config",
        {
            "num_hidden_layers": 4,
            "head_dim": 64,
            "sliding_window": 32,
            "layer_types": SLIDING_THEN_FULL,
            "attn_logit_softcapping": 2.0,
            "final_logit_softcapping": 8.0,
            "query_pre_attn_scalar": 32,
        },
        notes="soft caps, alternating windows, norms before and after, tied head",
    ),
    "gemma3": Architecture(
        "Gemma3TextConfig",
        {
            "num_hidden_layers": 4,
            "head_dim": 64,
            "sliding_window": 32,
            "layer_types": SLIDING_THEN_FULL,
            "query_pre_attn_scalar": 32,
        },
        notes="alternating windows with two rope bases, query and key norms, tied head",
    ),
    "phi3": Architecture(
        "Phi3Config",
        {"sliding_window": 32, "partial_rotary_factor": 0.5},
        notes="fused qkv and gate_up, sliding window, partial rotary",
    ),
    "opt": Architecture(
        "OPTConfig",
        {
            "ffn_dim": 256,
            "word_embed_proj_dim": 64,
            "do_layer_norm_before": True,
            "activation_function": "relu",
        },
        without=("num_key_value_heads", "intermediate_size"),
        notes="learned positions, embedding projections, biases, tied head",
    ),
    "gpt-neox": Architecture(
        "GPTNeoXConfig",
        {"rotary_pct": 0.25, "use_parallel_residual": True},
        without=NO_KV,
        notes="parallel residual, partial rotary, interleaved qkv",
    ),
    "gpt2": Architecture(
        "GPT2Config",
        {"n_embd": 128, "n_layer": 3, "n_head": 4, "n_inner": 256, "n_positions": 512},
        without=tuple(DECODER.keys() - {"vocab_size", "bos_token_id", "eos_token_id"}),
        notes="Conv1D, learned positions, tied head",
    ),
    "falcon": Architecture(
        "FalconConfig",
        {
            "new_decoder_architecture": True,
            "num_kv_heads": 2,
            "ffn_hidden_size": 512,  # vLLM ignores this and takes four times hidden_size
            "parallel_attn": True,
            "bias": False,
            "alibi": False,
        },
        without=("num_key_value_heads", "intermediate_size", "pad_token_id"),
        notes="new decoder architecture: two norms, grouped and interleaved qkv",
    ),
    "qwen2": Architecture("Qwen2Config", {}, notes="biases of q, k and v"),
    "qwen3": Architecture(
        "Qwen3Config",
        {"head_dim": 64, "tie_word_embeddings": True},
        notes="query and key norms, tied head, head_dim of its own",
    ),
    "olmo2": Architecture("Olmo2Config", {}, notes="norms after, norms of queries and keys"),
    "granite": Architecture(
        "GraniteConfig",
        {
            "embedding_multiplier": 3.0,
            "logits_scaling": 1.5,
            "residual_multiplier": 0.5,
            "attention_multiplier": 0.2,
        },
        notes="four multipliers",
    ),
    "smollm3": Architecture(
        "SmolLM3Config",
        {"num_hidden_layers": 4, "no_rope_layers": [1, 0, 1, 0], "tie_word_embeddings": True},
        notes="layers without positions, tied head",
    ),
    "mixtral": Architecture(
        "MixtralConfig",
        {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None},
        ignore=ROUTERS,
        notes="experts",
        more_formats=("NVFP4A16", "MXFP4A16"),
    ),
    "qwen3-moe": Architecture(
        "Qwen3MoeConfig",
        {"head_dim": 64, "num_experts": 4, "norm_topk_prob": True, **EXPERTS},
        ignore=ROUTERS,
        notes="experts, query and key norms",
    ),
    "deepseek-v2": Architecture(
        "DeepseekV2Config",
        {
            "num_key_value_heads": 4,
            "q_lora_rank": 128,
            "kv_lora_rank": 512,  # with qk_rope_head_dim, the one size of vLLM's MLA on a CPU
            "qk_nope_head_dim": 32,
            "qk_rope_head_dim": 64,
            "v_head_dim": 32,
            "n_routed_experts": 4,
            "n_shared_experts": 1,
            "first_k_dense_replace": 1,
            "topk_method": "greedy",
            "n_group": 1,
            "topk_group": 1,
            **EXPERTS,
        },
        ignore=EXPERTS_KEPT,
        notes="MLA, shared experts, first layer dense",
        known_fault=ROTARY_FAULT,
    ),
    "deepseek-v3": Architecture(
        "DeepseekV3Config",
        {
            "num_key_value_heads": 4,
            "q_lora_rank": 128,
            "kv_lora_rank": 512,  # with qk_rope_head_dim, the one size of vLLM's MLA on a CPU
            "qk_nope_head_dim": 32,
            "qk_rope_head_dim": 64,
            "v_head_dim": 32,
            "n_routed_experts": 8,
            "n_shared_experts": 1,
            "first_k_dense_replace": 1,
            "n_group": 2,
            "topk_group": 1,
            "routed_scaling_factor": 1.5,
            "topk_method": "noaux_tc",  # vLLM reads these two; transformers has no use for them
            "scoring_func": "sigmoid",
            **EXPERTS,
        },
        ignore=EXPERTS_KEPT,
        notes="MLA, shared experts, grouped routing with its bias",
        known_fault=ROTARY_FAULT,
    ),
    "gpt-oss": Architecture(
        "GptOssConfig",
        {
            "head_dim": 32,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "sliding_window": 32,
            "num_hidden_layers": 4,
            "layer_types": SLIDING_THEN_FULL,
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 10000.0,
                "factor": 4.0,
                "original_max_position_embeddings": 128,
                "beta_fast": 32.0,
                "beta_slow": 1.0,
                "truncate": False,
            },
        },
        ignore=EXPERTS_KEPT,
        notes="attention sinks, alternating windows, experts with biases",
    ),
    "qwen3-next": Architecture(
        "Qwen3NextConfig",
        {
            "num_hidden_layers": 4,
            "head_dim": 64,
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 4,
            "linear_key_head_dim": 32,
            "linear_value_head_dim": 32,
            "num_experts": 4,
            "shared_expert_intermediate_size": 128,
            "mlp_only_layers": [0, 1],
            **EXPERTS,
        },
        ignore=(*EXPERTS_KEPT, r"re:.*\.in_proj_ba$"),
        notes="gated delta net in three of four layers, gated attention",
    ),
    "lfm2": Architecture(
        "Lfm2Config",
        {
            "num_hidden_layers": 4,
            "layer_types": ["conv", "full_attention", "conv", "full_attention"],
            "block_ff_dim": 256,
            "block_auto_adjust_ff_dim": False,
            "conv_dim": 128,  # vLLM reads these two; transformers has no use for them
            "block_dim": 128,
        },
        notes="short convolutions between attention layers",
        known_fault=ROTARY_FAULT,
    ),
    "granite-hybrid": Architecture(
        "GraniteMoeHybridConfig",
        {
            "num_hidden_layers": 4,
            "layer_types": ["mamba", "attention", "mamba", "attention"],
            "num_local_experts": 0,
            "num_experts_per_tok": 0,
            "shared_intermediate_size": 256,
            "mamba_n_heads": 8,
            "mamba_d_head": 32,
            "mamba_d_state": 32,
            "mamba_n_groups": 1,
            "embedding_multiplier": 3.0,
            "attention_multiplier": 0.2,
        },
        notes="Mamba 2 between attention layers",
    ),
    "roberta": Architecture(
        "RobertaConfig", ENCODER, "token_classify", without=NO_KV, notes="positions from 2 on"
    ),
    "xlm-roberta": Architecture(
        "XLMRobertaConfig", ENCODER, "token_classify", without=NO_KV, notes="positions from 2 on"
    ),
    "modernbert": Architecture(
        "ModernBertConfig",
        {
            "num_labels": 7,
            "local_attention": 32,
            "global_attn_every_n_layers": 2,
            "num_hidden_layers": 4,
            "cls_token_id": 1,
            "sep_token_id": 2,
        },
        "token_classify",
        without=NO_KV,
        notes="alternating windows both ways, fused Wqkv and Wi",
    ),
    "deberta-v2": Architecture(
        "DebertaV2Config",
        {"num_labels": 7, "relative_attention": True, "pos_att_type": ["p2c", "c2p"]},
        "token_classify",
        without=NO_KV,
        notes="disentangled attention",
    ),
}
