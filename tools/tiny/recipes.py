"""What each embedded checkpoint is made of: a base model, and the formats of its linears."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

STATIC_INT8 = {"num_bits": 8, "type": "int", "strategy": "tensor", "dynamic": False}
DYNAMIC_INT8 = {"num_bits": 8, "type": "int", "strategy": "token", "dynamic": True}


@dataclass(frozen=True)
class Group:
    """One config group: a preset of compressed-tensors, and what is otherwise in it."""

    preset: str
    targets: tuple[str, ...] = ("Linear",)
    weights: Mapping[str, Any] = field(default_factory=dict)
    inputs: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Recipe:
    """What one embedded checkpoint is made of."""

    groups: tuple[Group, ...]
    base: str = "llama"
    ignore: tuple[str, ...] = ("lm_head",)
    fp8_kv_cache: bool = False


RECIPES: dict[str, Recipe] = {
    "tiny-llama-w4a16": Recipe((Group("W4A16"),)),
    "tiny-llama-w4a16-asym": Recipe((Group("W4A16_ASYM"),)),
    "tiny-llama-w4a16-actorder": Recipe((Group("W4A16", weights={"actorder": "group"}),)),
    "tiny-llama-w8a16": Recipe((Group("W8A16"),)),
    "tiny-llama-w8a8": Recipe((Group("W8A8"),)),
    "tiny-llama-w8a8-asym": Recipe((Group("W8A8", inputs={**DYNAMIC_INT8, "symmetric": False}),)),
    "tiny-llama-w8a8-static": Recipe((Group("W8A8", inputs=STATIC_INT8),)),
    "tiny-llama-w8a8-static-asym": Recipe(
        (Group("W8A8", inputs={**STATIC_INT8, "symmetric": False}),)
    ),
    "tiny-llama-fp8": Recipe((Group("FP8"),)),
    "tiny-llama-fp8-dynamic": Recipe((Group("FP8_DYNAMIC"),)),
    "tiny-llama-fp8-block": Recipe((Group("FP8_BLOCK"),)),
    "tiny-llama-fp8-kv": Recipe((Group("FP8"),), fp8_kv_cache=True),
    "tiny-llama-nvfp4": Recipe((Group("NVFP4"),)),
    "tiny-llama-nvfp4a16": Recipe((Group("NVFP4A16"),)),
    "tiny-llama-mxfp4a16": Recipe((Group("MXFP4A16"),)),
    "tiny-llama-mxfp8": Recipe((Group("MXFP8"),)),
    "tiny-llama-w4afp8": Recipe((Group("W4AFP8"),)),
    "tiny-llama-mixed": Recipe(
        (
            Group("FP8_DYNAMIC", targets=(r"re:.*self_attn\.[qkvo]_proj$",)),
            Group("W4A16", targets=(r"re:.*mlp\.(gate|up|down)_proj$",)),
        ),
        ignore=("lm_head", r"re:.*layers\.3\.mlp\..*"),
    ),
    "tiny-qwen3-w4a16": Recipe((Group("W4A16"),), base="qwen3"),
    "tiny-qwen3-w8a8": Recipe((Group("W8A8"),), base="qwen3"),
}
# Each of the models with heads, in three formats; heads stay as they are.
HEADS = {
    "ner-qwen2": "score",
    "ner-bert": "classifier",
    "prm-qwen2": "score",
    "prm-native": "re:score.*",
    "reward-qwen2": "score",
    "colbert-bert": "linear",
}
RECIPES |= {
    f"tiny-{base}-{preset.lower().replace('_', '-')}": Recipe(
        (Group(preset),), base=base, ignore=(head,)
    )
    for base, head in HEADS.items()
    for preset in ("W4A16", "W8A8", "FP8_DYNAMIC")
}
