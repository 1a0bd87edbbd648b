"""What each real quantized checkpoint is made of."""

from tiny.recipes import Group, Recipe

# 576 inputs are no multiple of 128, the presets' group size.
GROUPS_OF_64 = {"group_size": 64}
RECIPES = {
    "smollm2-w4a16": Recipe((Group("W4A16", weights=GROUPS_OF_64),), base="smollm2"),
    "smollm2-w4a16-asym": Recipe((Group("W4A16_ASYM", weights=GROUPS_OF_64),), base="smollm2"),
    "smollm2-w8a8": Recipe((Group("W8A8"),), base="smollm2"),
    "smollm2-fp8-dynamic": Recipe((Group("FP8_DYNAMIC"),), base="smollm2"),
    "smollm2-fp8": Recipe((Group("FP8"),), base="smollm2"),
    "smollm2-nvfp4a16": Recipe((Group("NVFP4A16"),), base="smollm2"),
    "smollm2-nvfp4": Recipe((Group("NVFP4"),), base="smollm2"),
    "smollm2-mxfp4a16": Recipe((Group("MXFP4A16"),), base="smollm2"),
    "minilm-w4a16": Recipe((Group("W4A16"),), base="minilm", ignore=("pooler.dense",)),
    "minilm-w8a8": Recipe((Group("W8A8"),), base="minilm", ignore=("pooler.dense",)),
    "minilm-fp8-dynamic": Recipe((Group("FP8_DYNAMIC"),), base="minilm", ignore=("pooler.dense",)),
}
