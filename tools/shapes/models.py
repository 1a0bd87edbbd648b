"""The shapes of models that people quantize, from the config.json that each was published with."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Shape:
    """A decoder: dense if it has no `experts`, else a mixture of which `chosen` serve a token."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    vocabulary: int
    head_dim: int
    tied: bool = False
    experts: int = 0
    chosen: int = 0

    def config(self) -> dict[str, Any]:
        """Return its config.json: a Llama's, or Qwen3-MoE's."""
        common = {
            "bos_token_id": 0,
            "dtype": "bfloat16",
            "eos_token_id": 1,
            "head_dim": self.head_dim,
            "hidden_act": "silu",
            "hidden_size": self.hidden,
            "intermediate_size": self.intermediate,
            "max_position_embeddings": 8192,
            "num_attention_heads": self.heads,
            "num_hidden_layers": self.layers,
            "num_key_value_heads": self.kv_heads,
            "rms_norm_eps": 1e-5,
            "rope_parameters": {"rope_theta": 500000.0, "rope_type": "default"},
            "tie_word_embeddings": self.tied,
            "vocab_size": self.vocabulary,
        }
        if not self.experts:
            return {"architectures": ["LlamaForCausalLM"], "model_type": "llama", **common}
        return {
            "architectures": ["Qwen3MoeForCausalLM"],
            "model_type": "qwen3_moe",
            **common,
            "decoder_sparse_step": 1,
            "mlp_only_layers": [],
            "moe_intermediate_size": self.intermediate,
            "norm_topk_prob": True,
            "num_experts": self.experts,
            "num_experts_per_tok": self.chosen,
        }

    def linears(self) -> Iterator[tuple[str, int, int]]:
        """Yield the linears of one layer that are quantized: name, outputs and inputs."""
        queries, keys = self.heads * self.head_dim, self.kv_heads * self.head_dim
        yield "self_attn.q_proj", queries, self.hidden
        yield "self_attn.k_proj", keys, self.hidden
        yield "self_attn.v_proj", keys, self.hidden
        yield "self_attn.o_proj", self.hidden, queries
        parts = [f"mlp.experts.{i}" for i in range(self.experts)] if self.experts else ["mlp"]
        for part in parts:
            yield f"{part}.gate_proj", self.intermediate, self.hidden
            yield f"{part}.up_proj", self.intermediate, self.hidden
            yield f"{part}.down_proj", self.hidden, self.intermediate

    def others(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Yield the tensors of one layer that stay as they are: name and shape."""
        yield "input_layernorm.weight", (self.hidden,)
        yield "post_attention_layernorm.weight", (self.hidden,)
        if self.experts:
            yield "mlp.gate.weight", (self.experts, self.hidden)
            yield "self_attn.q_norm.weight", (self.head_dim,)
            yield "self_attn.k_norm.weight", (self.head_dim,)

    @property
    def products(self) -> int:
        """Multiplications for one token, in the layers and in the head."""
        sizes = [
            (outputs * inputs) * (self.chosen / self.experts if ".experts." in name else 1)
            for name, outputs, inputs in self.linears()
        ]
        router = self.experts * self.hidden
        return int(self.layers * (sum(sizes) + router)) + self.hidden * self.vocabulary


SHAPES = {
    "0.5b": Shape(896, 4864, 24, 14, 2, 151936, 64, tied=True),  # Qwen2.5-0.5B
    "1b": Shape(2048, 8192, 16, 32, 8, 128256, 64, tied=True),  # Llama-3.2-1B
    "8b": Shape(4096, 14336, 32, 32, 8, 128256, 128),  # Llama-3.1-8B
    "32b": Shape(5120, 27648, 64, 40, 8, 152064, 128),  # Qwen2.5-32B
    "70b": Shape(8192, 28672, 80, 64, 8, 128256, 128),  # Llama-3.1-70B
    "30b-a3b": Shape(2048, 768, 48, 32, 4, 151936, 128, experts=128, chosen=8),  # Qwen3-30B-A3B
}
