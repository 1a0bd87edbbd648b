"""Write the defaults of transformers' config classes, which the audit needs without transformers.

    python tools/config_defaults.py

A config.json need not say what its class takes by default, and a later version of transformers says
more of it than an earlier one did. `quantgate audit` reads these defaults to tell that from a
changed config. Run this after the pinned transformers changes.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from quantgate.atomic import write_atomically
from quantgate.audit.effective import NO_DIFFERENCE

ROOT = Path(__file__).resolve().parent.parent
TARGET = ROOT / "src" / "quantgate" / "audit" / "config_defaults.json"
MODEL_TYPES = (
    *("bert", "bloom", "cohere", "cohere2", "deepseek_v2", "deepseek_v3", "exaone4", "falcon"),
    *("gemma", "gemma2", "gemma3", "gemma3_text", "glm", "glm4", "glm4_moe", "gpt2", "gpt_neox"),
    *("gpt_oss", "gptj", "granite", "granitemoe", "llama", "llama4", "llama4_text"),
    *("llama4_vision_model", "mistral", "mistral3", "mixtral", "modernbert", "nemotron", "olmo"),
    *("olmo2", "olmoe", "opt", "phi", "phi3", "phimoe", "pixtral", "qwen2", "qwen2_5_vl"),
    *("qwen2_5_vl_text", "qwen2_moe", "qwen2_vl", "qwen2_vl_text", "qwen3", "qwen3_moe"),
    *("qwen3_next", "qwen3_vl", "qwen3_vl_text", "roberta", "siglip_vision_model", "smollm3"),
    *("stablelm", "starcoder2", "xlm-roberta"),
)


def defaults(model_type: str) -> dict[str, Any]:
    """Return what a class takes for keys that a config does not say, where that is not nothing."""
    config = CONFIG_MAPPING[model_type]
    found: dict[str, Any] = {
        field.name: field.default
        for field in dataclasses.fields(config)
        if isinstance(field.default, bool | int | float | str) and field.default
    }
    theta = config.default_theta
    if isinstance(theta, dict):
        found |= {"rope.rope_theta": theta["global"], "rope.local_rope_theta": theta["local"]}
    else:
        found["rope.rope_theta"] = theta
    return {key: value for key, value in sorted(found.items()) if key not in NO_DIFFERENCE}


def table() -> dict[str, dict[str, Any]]:
    """Return each model type's defaults, and the names that its class gives to other keys."""
    return {
        model_type: {
            "defaults": defaults(model_type),
            "renamed": dict(sorted(CONFIG_MAPPING[model_type].attribute_map.items())),
        }
        for model_type in MODEL_TYPES
    }


def main() -> int:
    """Write the table, one model type a line."""
    lines = (f"{json.dumps(name)}: {json.dumps(said)}" for name, said in table().items())
    write_atomically(TARGET, "{\n" + ",\n".join(lines) + "\n}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
