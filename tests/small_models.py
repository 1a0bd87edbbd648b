"""Small models of random weights, of every kind of architecture, and a probe for them."""

from pathlib import Path
from typing import Any

import numpy as np
import torch

from quantgate.subject.probe import Probe, Window

IDS = tuple(int(i) for i in np.random.default_rng(0).integers(3, 500, 60))
SHORT = Probe(
    "short",
    512,
    (Window("a", "s", 1, IDS[:40], ""), Window("b", "s", 5, IDS[20:], "")),
)
SMALL: dict[str, Any] = {
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 256,
    "initializer_range": 0.2,
}


def small_models() -> dict[str, Any]:
    """What models differ in: biases, tied heads, norms of queries and keys, soft caps, experts."""
    import transformers as hf

    return {
        "llama-biases": hf.LlamaConfig(**SMALL, attention_bias=True, mlp_bias=True),
        "qwen2": hf.Qwen2Config(**{k: v for k, v in SMALL.items() if k != "head_dim"}),
        "qwen3-tied": hf.Qwen3Config(**SMALL, tie_word_embeddings=True),
        "gemma2-soft-caps": hf.Gemma2Config(
            **SMALL,
            final_logit_softcapping=5.0,
            attn_logit_softcapping=20.0,
            sliding_window=16,
            query_pre_attn_scalar=16,
        ),
        "gemma3-sliding": hf.Gemma3TextConfig(**SMALL, sliding_window=16, query_pre_attn_scalar=16),
        "granite-multipliers": hf.GraniteConfig(
            **{k: v for k, v in SMALL.items() if k != "head_dim"},
            embedding_multiplier=3.0,
            logits_scaling=2.0,
            residual_multiplier=0.5,
            attention_multiplier=0.2,
        ),
        "qwen3-moe": hf.Qwen3MoeConfig(
            **SMALL,
            num_experts=6,
            num_experts_per_tok=2,
            moe_intermediate_size=48,
            norm_topk_prob=True,
        ),
    }


def save_random(config: Any, directory: Path) -> Any:
    """Save a random model in float32 and return it; no parameter keeps an initial 0 or 1."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    # HF's sdpa leaves Gemma 2's soft cap out.
    attention = "sdpa" if getattr(config, "attn_logit_softcapping", None) is None else "eager"
    model = AutoModelForCausalLM.from_config(
        config, dtype=torch.float32, attn_implementation=attention
    ).eval()
    if model._can_set_experts_implementation():
        model.set_experts_implementation("eager")
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(directory)
    return model


def quiet(_: str) -> None:
    pass


@torch.inference_mode()
def unstreamed(model: Any, probe: Probe) -> np.ndarray[Any, Any]:
    """Score with all layers at once, on as many rows a product as the streamed model has.

    A product of another number of rows may be another kernel, which rounds otherwise; of the same
    rows, in the same process, streaming changes no operation, and so no bit of any score.
    """
    parts = []
    for window in probe.windows:
        ids = torch.tensor(window.ids)
        output = model(ids[None, :-1], logits_to_keep=window.scored, use_cache=False)
        logprobs = output.logits[0].log_softmax(-1)
        parts.append(logprobs.gather(1, ids[window.score_from :, None])[:, 0].numpy())
    return np.concatenate(parts)
