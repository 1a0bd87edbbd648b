"""Small random models of the architectures that people quantize, and their quantized forms.

Each has what sets its architecture apart switched on, and sizes that W4A16's groups of 128 divide.
Nothing here is trained: the models stand for an architecture's code, not for its quality.
"""

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantize_tiny import Group, quantize_linear, scheme_of

from quantgate.errors import BadInput
from quantgate.formats.groups import group_of
from quantgate.measuring.checkpoint_names import CheckpointNames
from quantgate.measuring.layer_by_layer import layers_of
from quantgate.subject.task import GENERATE, Task

if TYPE_CHECKING:
    import torch

TOKENIZER = Path(__file__).resolve().parent.parent / "fixtures" / "tiny" / "ner-bert"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")
FORMATS = ("W4A16", "W8A8", "FP8_DYNAMIC")
SEED = 20
VOCABULARY = 512
# Norms, biases and their like are this far from what they are initialized to.
NOISE = 0.1
# Of the head's output, in nat: neither flat nor certain.
LOGIT_SIZE = 2.0
TIED_SIZE = 1.5


@dataclass(frozen=True)
class Architecture:
    """One architecture, small."""

    config: str
    """The name of its config class in transformers."""
    options: Mapping[str, Any]
    task: Task = GENERATE
    ignore: tuple[str, ...] = ()
    """What stays unquantized besides the head, as `ignore` of a quantization_config."""
    notes: str = ""
    """The features that are switched on."""
    without: tuple[str, ...] = field(default=())
    """Options of `DECODER` that it has no use for."""
    known_fault: str = ""
    """Why it fails, where that has been found out."""


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
# vLLM has no kernels for quantized experts on a CPU, so they stay as they are, as routers do.
EXPERTS_KEPT = (r"re:.*\.(gate|router|shared_expert_gate)$", r"re:.*\.experts\..*")

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
            "ffn_hidden_size": 512,  # vLLM takes four times hidden_size, whatever this says
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
        ignore=EXPERTS_KEPT,
        notes="experts",
    ),
    "qwen3-moe": Architecture(
        "Qwen3MoeConfig",
        {"head_dim": 64, "num_experts": 4, "norm_topk_prob": True, **EXPERTS},
        ignore=EXPERTS_KEPT,
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


def make(architecture: Architecture, directory: Path) -> Any:
    """Write a random model of an architecture, in bfloat16, to a directory that is not there yet.

    Returns it as HF's model in float32, of the weights that were written.
    """
    import torch
    import transformers

    options = {k: v for k, v in DECODER.items() if k not in architecture.without}
    config = getattr(transformers, architecture.config)(**{**options, **architecture.options})
    kind = (
        transformers.AutoModelForCausalLM
        if architecture.task == GENERATE
        else transformers.AutoModelForTokenClassification
    )
    torch.manual_seed(SEED)
    model = kind.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        _randomize(model)
    model.to(torch.bfloat16).save_pretrained(directory)
    if architecture.task != GENERATE:
        for name in TOKENIZER_FILES:  # vLLM reads the tokenizer of some encoders
            shutil.copyfile(TOKENIZER / name, directory / name)
    return model.float()


def _randomize(model: Any) -> None:
    """Give weights the size at which outputs are like inputs, and norms and biases some noise."""
    import torch

    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    special = {embedding.weight: 1.0}
    if head is not None:
        # A tied head sees its own input again where layers add little to it, as Gemma's do.
        size = TIED_SIZE if head.weight is embedding.weight else LOGIT_SIZE
        special[head.weight] = size / head.weight.shape[1] ** 0.5
    for module in model.modules():
        own = [*module.named_parameters(recurse=False)]
        own += [
            (n, b) for n, b in module.named_buffers(recurse=False) if n == "e_score_correction_bias"
        ]
        for name, values in own:
            if values.ndim < 2 or "norm" in name:
                values.add_(torch.randn_like(values) * NOISE)
            elif "Conv1d" not in type(module).__name__:
                values.copy_(
                    torch.randn_like(values) * special.get(values, values.shape[-1] ** -0.5)
                )
    # Exactly as they are stored, so that the model that is returned is the one that was written.
    for values in (*model.parameters(),):
        values.copy_(values.bfloat16())


def quantize(model: Any, base: Path, target: Path, preset: str, ignore: tuple[str, ...]) -> None:
    """Write `base`, an HF model's files, with the linears of its layers rounded to nearest.

    What is outside of the layers, and what `ignore` names, stays as it is. Raises `BadInput` where
    nothing is left.
    """
    from compressed_tensors.quantization import QuantizationConfig
    from safetensors.torch import load_file, save_file

    scheme = scheme_of(Group(preset))
    tensors = load_file(base / "model.safetensors")
    names = CheckpointNames(model, tensors)
    kept = [*ignore, *map(names.module, _linears_outside(model))]
    linears = linears_of(model, names, tensors, kept)
    if not linears:
        raise BadInput(
            f"{type(model).__name__} has no torch.nn.Linear in its layers, and compressed-tensors "
            "quantizes nothing else (GPT-2's are transformers' Conv1D)."
        )
    for name in linears:
        parts = quantize_linear(tensors.pop(f"{name}.weight"), scheme)
        tensors |= {f"{name}.{part}": value for part, value in parts.items()}
    quantization = QuantizationConfig(
        config_groups={"group_0": scheme},
        ignore=kept,
        format=str(scheme.format.value),
        quantization_status="compressed",
    ).model_dump(mode="json")
    target.mkdir(parents=True)
    save_file(tensors, target / "model.safetensors", {"format": "pt"})
    config = json.loads((base / "config.json").read_text())
    config["quantization_config"] = {**quantization, "quant_method": "compressed-tensors"}
    (target / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    for name in ("generation_config.json", *TOKENIZER_FILES):
        if (base / name).exists():
            shutil.copyfile(base / name, target / name)


def _linears_outside(model: Any) -> list[str]:
    """Return the names of the linears outside a model's layers: heads, projections."""
    import torch

    inside = {id(module) for module in (layers_of(model.base_model) or torch.nn.Module()).modules()}
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and id(module) not in inside
    ]


def linears_of(
    model: Any,
    names: CheckpointNames,
    tensors: "Mapping[str, torch.Tensor]",
    ignore: list[str],
) -> list[str]:
    """Return the checkpoint's names of the linears to quantize: those of layers, and of experts."""
    import torch

    quantization = {"config_groups": {"all": {"targets": ["Linear"]}}, "ignore": ignore}
    linears = {
        names.module(name)
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear)
    }
    modules = [name.removesuffix(".weight") for name in tensors if name.endswith(".weight")]
    return [
        name
        for name in modules
        if (name in linears or ".experts." in name)
        and group_of(name, "Linear", quantization) is not None
    ]
