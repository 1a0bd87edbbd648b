"""Faults in checkpoints and goldens that no checksum betrays."""

import json
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file

from quantgate.judging.golden import CHECKSUM, _checksum


def scale_one_group(directory: Path, factor: float) -> None:
    """Multiply one group's scale, in one row of one layer, as a silent fault would."""
    path = directory / "model.safetensors"
    tensors = load_file(path)
    scale = tensors["model.layers.1.mlp.down_proj.weight_scale"]
    scale[7, 2] = (scale[7, 2].float() * factor).to(scale.dtype)
    save_file(tensors, path, {"format": "pt"})


def sealed(content: dict[str, Any]) -> str:
    """Return a golden's text with the checksum that belongs to it."""
    return json.dumps({**content, CHECKSUM: _checksum(content)})
