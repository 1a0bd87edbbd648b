"""Build the embedded quantized checkpoints from the tiny base models, byte for byte the same.

    python tools/quantize_tiny.py               build what is missing or stale under build/
    python tools/quantize_tiny.py --pin         also write the new identities into the TOML files
    python tools/quantize_tiny.py --calibrate   measure the base models' activation ranges anew

Each checkpoint is written by compressed-tensors' own compressors. `fixtures/checkpoints/<id>.toml`
pins the sha256 of the result, so a build that differs in one byte is an error. Static activation
scales come from `fixtures/tiny/<base>/ranges.json`, because a forward pass is not the same to the
last bit on every machine.
"""

import argparse
import functools
import json
import re
import shutil
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantgate.atomic import write_atomically
from quantgate.errors import BadInput
from quantgate.formats.groups import fused_with, group_of
from quantgate.subject.checkpoint_file import read_checkpoint_files
from quantgate.subject.files import identity

if TYPE_CHECKING:
    import torch

ROOT = Path(__file__).resolve().parent.parent
TINY = ROOT / "fixtures" / "tiny"
BUILD = ROOT / "build"
COPIED = (
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "generation_config.json",
)
# Training documents of each stratum that the ranges are taken over.
CALIBRATION_DOCUMENTS = 20
STATIC_INT8 = {"num_bits": 8, "type": "int", "strategy": "tensor", "dynamic": False}
DYNAMIC_INT8 = {"num_bits": 8, "type": "int", "strategy": "token", "dynamic": True}
FP8_KV_CACHE = {"num_bits": 8, "type": "float", "strategy": "tensor", "dynamic": False}


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
# The linears of decoders, and those of a BERT.
LINEAR = re.compile(r".*(_proj|\.(query|key|value|dense))\.weight")


def scheme_of(group: Group) -> Any:
    """Return a group as compressed-tensors' `QuantizationScheme`, its format filled in."""
    import torch
    from compressed_tensors.compressors.format import infer_module_format
    from compressed_tensors.config import CompressionFormat
    from compressed_tensors.quantization import QuantizationArgs, preset_name_to_scheme

    scheme = preset_name_to_scheme(group.preset, list(group.targets))
    if group.weights:
        scheme.weights = scheme.weights.model_copy(update=dict(group.weights))
    if group.inputs:
        scheme.input_activations = QuantizationArgs(**group.inputs)
    # vLLM takes W4AFP8 packed; compressed-tensors would write its codes as int8.
    inferred = infer_module_format(torch.nn.Linear, scheme)
    scheme.format = CompressionFormat("pack-quantized") if group.preset == "W4AFP8" else inferred
    return scheme


def quantize_linear(
    weight: "torch.Tensor", scheme: Any, global_scale: "torch.Tensor | None" = None
) -> dict[str, "torch.Tensor"]:
    """Return the tensors that stand for one linear's weight [out, in], rounded to nearest.

    Scales are computed in float32 and stored in the weight's dtype; codes are taken against the
    stored scale, so that nothing depends on how a machine rounds intermediate results.
    """
    import torch
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization.utils import calculate_qparams

    args = scheme.weights
    order = column_order(weight) if args.actorder else None
    columns = weight if order is None else weight[:, order]
    lowest, highest = ranges_of(columns.float(), args)
    scale, zero_point = calculate_qparams(lowest, highest, args, global_scale)
    state = {
        "weight": weight,
        "weight_scale": scale.to(weight.dtype),
        "weight_zero_point": zero_point.to(torch.int8),
    }
    if global_scale is not None:
        # E2M1 codes are taken in float32: the quotient of three numbers is not exact in bfloat16.
        state |= {"weight": weight.float(), "weight_scale": scale.float()}
        state["weight_global_scale"] = global_scale
    if order is not None:
        groups = torch.arange(len(order)) // args.group_size
        state["weight_g_idx"] = groups[order.argsort()].int()
    compressor = BaseCompressor.get_value_from_registry(str(scheme.format.value))
    return {name: t.contiguous() for name, t in compressor.compress(state, scheme).items()}


def ranges_of(weight: "torch.Tensor", args: Any) -> tuple["torch.Tensor", "torch.Tensor"]:
    """Return the smallest and largest weight under each scale, shaped as the scales are."""
    rows, columns = weight.shape
    if args.strategy == "tensor":
        return weight.min(), weight.max()
    if args.strategy == "channel":
        parts, over = weight, (1,)
        return parts.amin(over, keepdim=True), parts.amax(over, keepdim=True)
    if args.strategy == "block":
        height, width = args.block_structure
        blocks = weight.view(rows // height, height, columns // width, width)
        return blocks.amin((1, 3)), blocks.amax((1, 3))
    groups = weight.view(rows, -1, args.group_size)
    return groups.amin(2), groups.amax(2)


def column_order(weight: "torch.Tensor") -> "torch.Tensor":
    """Return the columns [in] by falling sum of squares, which float64 adds up exactly."""
    return weight.double().square().sum(dim=0).argsort(descending=True, stable=True)


def global_scales(linears: Mapping[str, "torch.Tensor"], scheme: Any) -> dict[str, "torch.Tensor"]:
    """Return NVFP4's global scale of each linear, one for all that vLLM fuses; {} for others.

    vLLM takes the largest, and codes that were taken against a smaller one would no longer fit.
    """
    import torch
    from compressed_tensors.quantization.utils import generate_gparam

    if scheme.weights.strategy != "tensor_group":
        return {}
    scales = {}
    for name in linears:
        fused = [linears[other] for other in fused_with(name) if other in linears]
        largest = torch.stack([weight.float().abs().max() for weight in fused]).max()
        scales[name] = generate_gparam(-largest, largest)
    return scales


def static_inputs(scheme: Any, lowest: float, highest: float) -> dict[str, "torch.Tensor"]:
    """Return the tensors of a linear's static input scale."""
    import torch
    from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam

    args = scheme.input_activations
    bounds = torch.tensor(lowest), torch.tensor(highest)
    if args.strategy == "tensor_group":
        return {"input_global_scale": generate_gparam(*bounds)}
    scale, zero_point = calculate_qparams(*bounds, args)
    tensors = {"input_scale": scale.to(torch.bfloat16)}
    return tensors if args.symmetric else {**tensors, "input_zero_point": zero_point.to(torch.int8)}


def kv_scales(ranges: Mapping[str, Any], layer: str) -> dict[str, "torch.Tensor"]:
    """Return the scales of an FP8 KV cache for one attention layer: amax / 448.

    Keys are cached after their rotation, which keeps the norm of each pair: a factor of sqrt(2).
    """
    import torch

    scales = {}
    for kind, rotation in (("k", 2**0.5), ("v", 1.0)):
        lowest, highest = ranges["outputs"][f"{layer}.{kind}_proj"]
        amax = max(-lowest, highest) * rotation
        scales[f"{layer}.{kind}_scale"] = torch.tensor([amax / 448.0]).to(torch.bfloat16)
    return scales


@functools.cache
def _ranges(base: Path) -> dict[str, dict[str, tuple[float, float]]]:
    ranges: dict[str, dict[str, tuple[float, float]]] = json.loads(
        (base / "ranges.json").read_text()
    )
    return ranges


def quantize_model(base: Path, recipe: Recipe) -> tuple[dict[str, "torch.Tensor"], dict[str, Any]]:
    """Return a checkpoint's tensors, and the quantization_config that says what they are."""
    from compressed_tensors.quantization import QuantizationConfig
    from safetensors.torch import load_file

    tensors = load_file(base / "model.safetensors")
    schemes = [scheme_of(group) for group in recipe.groups]
    for scheme in schemes:
        linears = {
            name.removesuffix(".weight"): tensor
            for name, tensor in tensors.items()
            if LINEAR.fullmatch(name) and is_target(name.removesuffix(".weight"), scheme, recipe)
        }
        scales = global_scales(linears, scheme)
        for linear, weight in linears.items():
            del tensors[f"{linear}.weight"]
            parts = quantize_linear(weight, scheme, scales.get(linear))
            if (inputs := scheme.input_activations) and inputs.dynamic is not True:
                parts |= static_inputs(scheme, *_ranges(base)["inputs"][linear])
            tensors |= {f"{linear}.{part}": value for part, value in parts.items()}
    if recipe.fp8_kv_cache:
        layers = [name for name in _ranges(base)["outputs"] if name.endswith(".k_proj")]
        for layer in layers:
            tensors |= kv_scales(_ranges(base), layer.removesuffix(".k_proj"))
    formats = {str(scheme.format.value) for scheme in schemes}
    config = QuantizationConfig(
        config_groups={f"group_{i}": scheme for i, scheme in enumerate(schemes)},
        ignore=list(recipe.ignore),
        format=formats.pop() if len(formats) == 1 else "mixed-precision",
        quantization_status="compressed",
        kv_cache_scheme=FP8_KV_CACHE if recipe.fp8_kv_cache else None,
    )
    return tensors, config.model_dump(mode="json")


def is_target(linear: str, scheme: Any, recipe: Recipe) -> bool:
    """Whether a scheme is a linear's: named by a target, and not ignored."""
    groups = {"group": {"targets": scheme.targets}}
    return (
        group_of(linear, "Linear", {"config_groups": groups, "ignore": recipe.ignore}) is not None
    )


def build(base: Path, target: Path, recipe: Recipe) -> None:
    """Write the quantized checkpoint to `target`, which appears whole or not at all."""
    import torch
    from safetensors.torch import save_file

    # Compiled, the FP4 packing takes 15 s and a C++ compiler, for the same bytes.
    with torch.compiler.set_stance("force_eager"):
        tensors, quantization = quantize_model(base, recipe)
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        whole = Path(scratch) / target.name
        whole.mkdir()
        save_file(dict(sorted(tensors.items())), whole / "model.safetensors", {"format": "pt"})
        write_config(base, whole, quantization)
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


def calibrate(base: Path) -> None:
    """Write `ranges.json`: the range of each linear's input, and of keys and values.

    Rounded to 3 significant digits, away from zero, so that they hold on every machine.
    """
    import tiny_corpus
    import torch
    from rich.progress import track
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(base)
    ranges: dict[str, dict[str, tuple[float, float]]] = {"inputs": {}, "outputs": {}}

    def watch(name: str, inputs: torch.Tensor, output: torch.Tensor) -> None:
        seen = {"inputs": inputs}
        if name.endswith(("k_proj", "v_proj")):
            seen["outputs"] = output
        for kind, values in seen.items():
            lowest, highest = ranges[kind].get(name, (0.0, 0.0))
            ranges[kind][name] = min(lowest, values.min().item()), max(highest, values.max().item())

    for name, module in model.named_modules():
        if name.endswith("_proj"):
            module.register_forward_hook(
                lambda _, inputs, output, name=name: watch(name, inputs[0], output)
            )
    texts = [
        document.text
        for stratum in tiny_corpus.STRATA
        for document in tiny_corpus.documents("train", stratum, CALIBRATION_DOCUMENTS)
    ]
    with torch.inference_mode():
        for text in track(texts, "Calibrating"):
            model.base_model(torch.tensor([tokenizer(text).input_ids[:1024]]))
    rounded = {
        kind: {name: tuple(float(f"{value:.3g}") for value in pair) for name, pair in found.items()}
        for kind, found in ranges.items()
    }
    write_atomically(base / "ranges.json", json.dumps(rounded, indent=1, sort_keys=True) + "\n")


def pin(path: Path, revision: str) -> None:
    """Write an identity into a checkpoint file's `revision` line."""
    text = path.read_text()
    path.write_text(re.sub(r'(?m)^revision = ".*"$', f'revision = "{revision}"', text))


def main() -> int:
    """Build every embedded checkpoint that is missing or not the pinned one."""
    parser = argparse.ArgumentParser(description="Build the embedded quantized checkpoints.")
    parser.add_argument(
        "--pin", action="store_true", help="write the new identities into the TOMLs"
    )
    parser.add_argument(
        "--calibrate", action="store_true", help="measure the activation ranges anew, first"
    )
    arguments = parser.parse_args()
    if arguments.calibrate:
        for base in sorted({recipe.base for recipe in RECIPES.values()} - set(HEADS)):
            calibrate(TINY / base)
    checkpoints = read_checkpoint_files(ROOT)
    for name, recipe in RECIPES.items():
        # One that vLLM refuses has no file to gate it by, and no pin.
        pinned = checkpoints[name].revision if name in checkpoints else None
        if not arguments.pin and is_current(BUILD / name, pinned):
            continue
        build(TINY / recipe.base, BUILD / name, recipe)
        built = f"sha256:{identity(BUILD / name)}"
        print(f"{name}: built, {built}")
        if pinned and arguments.pin:
            pin(ROOT / "fixtures" / "checkpoints" / f"{name}.toml", built)
        elif pinned not in (None, built):
            print(
                f"error: {BUILD / name}: built {built}, but fixtures/checkpoints/{name}.toml pins "
                f"{pinned}; if the recipe was meant to change, run "
                "`python tools/quantize_tiny.py --pin`.",
                file=sys.stderr,
            )
            return 1
    return 0


def is_current(directory: Path, pinned: str | None) -> bool:
    """Whether a built checkpoint is there, whole, and the pinned one."""
    try:
        return f"sha256:{identity(directory)}" == pinned or (pinned is None and directory.is_dir())
    except (BadInput, OSError):
        return False


if __name__ == "__main__":
    sys.exit(main())
