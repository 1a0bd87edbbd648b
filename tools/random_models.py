"""Small random models of commonly quantized architectures, and their quantized forms.

Each has its architecture's special features switched on, and sizes divisible by W4A16's groups of
128. Nothing is trained: the models exercise an architecture's code, not its quality.
"""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantgate.errors import BadInput
from quantgate.formats.groups import group_of
from quantgate.measuring.checkpoint_names import CheckpointNames
from quantgate.measuring.layer_by_layer import layers_of
from quantgate.subject.task import GENERATE
from random_architectures import DECODER, Architecture
from tiny.quantizing import global_scales, quantize_linear, scheme_of
from tiny.recipes import Group

if TYPE_CHECKING:
    import torch

TOKENIZER = Path(__file__).resolve().parent.parent / "fixtures" / "tiny" / "ner-bert"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")
FORMATS = ("W4A16", "W8A8", "FP8_DYNAMIC")
SEED = 20
# How far norms, biases and similar parameters are moved from their initial values.
NOISE = 0.1
# Size of the head's output, in nat: neither flat nor certain.
LOGIT_SIZE = 2.0
TIED_SIZE = 1.5


def make(architecture: Architecture, directory: Path) -> Any:
    """Write a random model of an architecture, in bfloat16, to a directory that must not exist yet.

    Returns it as HF's model in float32, with the weights that were written.
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
        for name in TOKENIZER_FILES:  # for some encoders vLLM reads the tokenizer
            shutil.copyfile(TOKENIZER / name, directory / name)
    return model.float()


def _randomize(model: Any) -> None:
    """Scale weights so that outputs are as large as inputs; add noise to norms and biases."""
    import torch

    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    special = {embedding.weight: 1.0}
    if head is not None:
        # A tied head predicts its own input if layers add little to it, as Gemma's do.
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
    # Rounded as stored, so that the returned model is the one that was written.
    for values in (*model.parameters(),):
        values.copy_(values.bfloat16())


def quantize(model: Any, base: Path, target: Path, preset: str, ignore: tuple[str, ...]) -> None:
    """Write a copy of `base`, an HF model's files, with its layers' linears rounded to nearest.

    Modules outside the layers, and those in `ignore`, stay unquantized. Raises `BadInput` if none
    is left to quantize.
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
    overall = global_scales({name: tensors[f"{name}.weight"] for name in linears}, scheme)
    for name in linears:
        parts = quantize_linear(tensors.pop(f"{name}.weight"), scheme, overall.get(name))
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
    """Return the checkpoint's names of the linears to quantize: those in layers and in experts."""
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
