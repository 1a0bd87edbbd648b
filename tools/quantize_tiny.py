"""Build the embedded quantized checkpoints from the tiny base model, byte for byte the same.

    python tools/quantize_tiny.py            build what is missing or stale under build/
    python tools/quantize_tiny.py --pin      also write the new identities into the TOML files

Each checkpoint is written by compressed-tensors' own compressor. `fixtures/checkpoints/<id>.toml`
pins the sha256 of the result, so a build that differs in one byte is an error.
"""

import argparse
import json
import re
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantgate.checkpoint import BadInput, identity, read_checkpoint_file, read_checkpoint_files

if TYPE_CHECKING:
    import torch

ROOT = Path(__file__).resolve().parent.parent
COPIED = (
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "generation_config.json",
)


def w4a16(group_size: int = 128) -> "Any":
    """Return the W4A16 scheme: symmetric int4 weights, one scale per group of input columns."""
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    weights = QuantizationArgs(num_bits=4, symmetric=True, strategy="group", group_size=group_size)
    return QuantizationScheme(targets=["Linear"], weights=weights)


RECIPES: dict[str, Callable[[], Any]] = {"tiny-llama-w4a16": w4a16}


def quantize_linear(weight: "torch.Tensor", scheme: Any) -> dict[str, "torch.Tensor"]:
    """Return the tensors that stand for one linear's weight [out, in], rounded to nearest.

    Scales are computed in float32 and stored in the weight's dtype; codes are taken against the
    stored scale, so that nothing depends on how a machine rounds intermediate results.
    """
    import torch
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization.utils import calculate_qparams

    args = scheme.weights
    grouped = weight.float().view(len(weight), -1, args.group_size)
    scale, zero_point = calculate_qparams(grouped.amin(dim=2), grouped.amax(dim=2), args)
    state = {
        "weight": weight,
        "weight_scale": scale.to(weight.dtype),
        "weight_zero_point": zero_point.to(torch.int8),
    }
    compressor = BaseCompressor.get_value_from_registry("pack-quantized")
    return {name: t.contiguous() for name, t in compressor.compress(state, scheme).items()}


def build(base: Path, target: Path, scheme: Any) -> None:
    """Write the quantized checkpoint to `target`, which appears whole or not at all."""
    from compressed_tensors.quantization import QuantizationConfig
    from safetensors.torch import load_file, save_file

    config = QuantizationConfig(
        config_groups={"group_0": scheme},
        ignore=["lm_head"],
        format="pack-quantized",
        quantization_status="compressed",
    )
    tensors = {}
    for name, tensor in load_file(base / "model.safetensors").items():
        if name.endswith("_proj.weight"):
            linear = name.removesuffix("weight")
            parts = quantize_linear(tensor, scheme)
            tensors.update({linear + part: value for part, value in parts.items()})
        else:
            tensors[name] = tensor
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        whole = Path(scratch) / target.name
        whole.mkdir()
        save_file(dict(sorted(tensors.items())), whole / "model.safetensors", {"format": "pt"})
        write_config(base, whole, config.model_dump(mode="json"))
        for name in COPIED:
            if (base / name).exists():
                shutil.copyfile(base / name, whole / name)
        shutil.rmtree(target, ignore_errors=True)
        whole.rename(target)


def write_config(base: Path, target: Path, quantization: dict[str, Any]) -> None:
    """Write the base's config.json with the quantization_config added."""
    config = json.loads((base / "config.json").read_text())
    config["quantization_config"] = {**quantization, "quant_method": "compressed-tensors"}
    (target / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def pin(path: Path, sha256: str) -> None:
    """Write an identity into a checkpoint file's `revision` line."""
    text = path.read_text()
    path.write_text(re.sub(r'(?m)^revision = ".*"$', f'revision = "sha256:{sha256}"', text))


def main() -> int:
    """Build every embedded checkpoint that is missing or not the pinned one."""
    parser = argparse.ArgumentParser(description="Build the embedded quantized checkpoints.")
    parser.add_argument(
        "--pin", action="store_true", help="write the new identities into the TOMLs"
    )
    pin_new = parser.parse_args().pin
    for name, checkpoint in read_checkpoint_files(ROOT).items():
        if name not in RECIPES:
            continue
        target = ROOT / checkpoint.source
        pinned = (checkpoint.revision or "").removeprefix("sha256:")
        try:
            if not pin_new and identity(target) == pinned:
                print(f"{name}: up to date")
                continue
        except (BadInput, OSError):
            pass  # missing or damaged: build it
        build(ROOT / str(checkpoint.base), target, RECIPES[name]())
        built = identity(target)
        print(f"{name}: built, sha256:{built}")
        if pin_new:
            pin(ROOT / "fixtures" / "checkpoints" / f"{name}.toml", built)
            read_checkpoint_file(ROOT / "fixtures" / "checkpoints" / f"{name}.toml", ROOT)
        elif built != pinned:
            print(
                f"error: {target}: built sha256:{built}, but fixtures/checkpoints/{name}.toml pins "
                f"{checkpoint.revision}; if the recipe was meant to change, run "
                "`python tools/quantize_tiny.py --pin`.",
                file=sys.stderr,
            )
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
