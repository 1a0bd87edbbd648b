"""Llamas of random weights, in the shapes of models that people serve."""

import argparse
import json
from pathlib import Path
from typing import Any

# Llama 3.1 8B and Qwen2.5 0.5B; and one that takes no time.
SHAPES: dict[str, dict[str, int]] = {
    "8b": {
        "hidden": 4096, "layers": 32, "heads": 32, "kv_heads": 8, "intermediate": 14336,
        "vocab": 128256,
    },
    "0.5b": {
        "hidden": 896, "layers": 24, "heads": 14, "kv_heads": 2, "intermediate": 4864,
        "vocab": 151936,
    },
    "smallest": {
        "hidden": 64, "layers": 1, "heads": 1, "kv_heads": 1, "intermediate": 256, "vocab": 512,
    },
}  # fmt: skip
# compressed-tensors' presets, and the format that their linears are stored in.
SCHEMES = {"none": "", "W4A16": "pack-quantized", "FP8_DYNAMIC": "float-quantized"}


def write_config(directory: Path, arguments: argparse.Namespace) -> None:
    """Write a Llama config of the chosen shape; the weights are random."""
    from transformers import LlamaConfig

    config = LlamaConfig(
        architectures=["LlamaForCausalLM"],
        hidden_size=arguments.hidden,
        num_hidden_layers=arguments.layers,
        num_attention_heads=arguments.heads,
        num_key_value_heads=arguments.kv_heads,
        intermediate_size=arguments.intermediate,
        vocab_size=arguments.vocab,
        max_position_embeddings=arguments.tokens + 8,
        tie_word_embeddings=False,
        dtype=arguments.dtype,
    )
    if arguments.scheme != "none":
        config.quantization_config = quantization_config(arguments.scheme)
    config.save_pretrained(directory)


def quantization_config(scheme: str) -> dict[str, Any]:
    """Return what config.json says of linears that are quantized by a preset of their library."""
    from compressed_tensors.quantization import (
        QuantizationConfig,
        QuantizationStatus,
        preset_name_to_scheme,
    )

    config = QuantizationConfig(
        config_groups={"group_0": preset_name_to_scheme(scheme, targets=["Linear"])},
        format=SCHEMES[scheme],
        ignore=["lm_head"],
        quantization_status=QuantizationStatus.COMPRESSED,
    )
    return {**json.loads(config.model_dump_json()), "quant_method": "compressed-tensors"}
