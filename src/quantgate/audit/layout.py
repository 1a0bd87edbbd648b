"""Rules about a quantized module's tensors: complete, and each as its format requires."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from quantgate.audit.finding import Place, Rule
from quantgate.audit.headers import Entry
from quantgate.audit.quantization import Args, Group

if TYPE_CHECKING:
    from quantgate.audit.inventory import Inventory

FLOATS = ("BF16", "F16", "F32")
PACKED = "pack-quantized"
NVFP4 = "nvfp4-pack-quantized"
MXFP4 = "mxfp4-pack-quantized"
MXFP8 = "mxfp8-quantized"
WHOLE_CODES = ("int-quantized", "float-quantized", "naive-quantized")
FORMATS = (PACKED, NVFP4, MXFP4, MXFP8, *WHOLE_CODES)
# Parts that a module may also have in any format.
ALWAYS = frozenset(("bias", "weight_zero_point", "weight_g_idx", "weight_shape", "k_scale"))
OTHERS = frozenset(("v_scale", "q_scale", "output_scale", "output_zero_point"))


@dataclass(frozen=True)
class Part:
    """A tensor that a format needs: its allowed dtypes, and its shapes if known."""

    dtypes: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...] = ()


@dataclass(frozen=True)
class Layout:
    """The tensors of a module in a format."""

    rows: int
    columns: int
    parts: dict[str, Part] = field(default_factory=dict)


def format_of(group: Group) -> str:
    """Return a group's format, inferred if the config does not name it."""
    if group.format not in ("", "mixed-precision") or group.weights is None:
        return group.format
    if group.weights.kind == "float" and group.weights.bits == 4:
        return NVFP4 if group.weights.group_size == 16 else MXFP4
    if group.weights.kind == "float":
        return MXFP8 if group.weights.group_size == 32 else "float-quantized"
    return PACKED if group.inputs is None else "int-quantized"


def layout_of(group: Group, parts: Mapping[str, Entry]) -> Layout | None:
    """Return the tensors that a group's module must have; None if size or format is unknown."""
    args, form = group.weights, format_of(group)
    size = _size(parts, args)
    if args is None or form not in FORMATS or size is None:
        return None
    rows, columns = size
    needed = _weight(form, args, rows, columns)
    if not args.symmetric:
        needed["weight_zero_point"] = _zero_point(form, args, rows, columns)
    if args.actorder in ("group", "dynamic"):
        needed["weight_g_idx"] = Part(("I32", "I64"), ((columns,),))
    return Layout(rows, columns, needed | _inputs(group.inputs))


def groups_of_columns(args: Args, columns: int) -> int:
    """Return the number of scales per row."""
    return -(-columns // args.group_size) if args.group_size else 1


def _size(parts: Mapping[str, Entry], args: Args | None) -> tuple[int, int] | None:
    """Return a weight's rows and columns from what is on disk."""
    whole = parts.get("weight")
    if whole is not None and len(whole.shape) == 2:
        return whole.shape[0], whole.shape[1]
    packed = parts.get("weight_packed")
    if packed is None or len(packed.shape) != 2 or args is None:
        return None
    per_element = 2 if packed.dtype == "U8" else max(1, 32 // args.bits)
    columns = packed.shape[1] * per_element
    scale = parts.get("weight_scale")
    # The last word may hold padding: then the number of groups gives the number of columns.
    if scale is not None and args.group_size and len(scale.shape) == 2:
        by_scales = scale.shape[1] * args.group_size
        if columns - per_element < by_scales < columns:
            columns = by_scales
    return packed.shape[0], columns


def _weight(form: str, args: Args, rows: int, columns: int) -> dict[str, Part]:
    scales = _scale_shapes(args, rows, columns)
    if form == PACKED:
        per_word = max(1, 32 // args.bits)
        return {
            "weight_packed": Part(("I32",), ((rows, -(-columns // per_word)),)),
            "weight_scale": Part(FLOATS, scales),
            "weight_shape": Part(("I64", "I32"), ((2,),)),
        }
    if form == NVFP4:
        return {
            "weight_packed": Part(("U8",), ((rows, columns // 2),)),
            "weight_scale": Part(("F8_E4M3",), scales),
            "weight_global_scale": Part(("F32",), ((1,), ())),
        }
    if form == MXFP4:
        return {
            "weight_packed": Part(("U8",), ((rows, columns // 2),)),
            "weight_scale": Part(("U8", "F8_E8M0"), scales),
        }
    codes = ("F8_E4M3",) if args.kind == "float" else ("I8",)
    dtypes = ("U8", "F8_E8M0") if form == MXFP8 else FLOATS
    return {
        "weight": Part(codes, ((rows, columns),)),
        "weight_scale": Part(dtypes, scales),
    }


def _scale_shapes(args: Args, rows: int, columns: int) -> tuple[tuple[int, ...], ...]:
    if args.strategy == "tensor":
        return ((1,), (), (1, 1))
    if args.strategy == "channel":
        return ((rows, 1), (rows,))
    if args.strategy == "block" and args.block:
        height, width = args.block
        return ((-(-rows // height), -(-columns // width)),)
    return ((rows, groups_of_columns(args, columns)),)


def _zero_point(form: str, args: Args, rows: int, columns: int) -> Part:
    shapes = _scale_shapes(args, rows, columns)
    if form != PACKED:
        return Part(("I8", "U8"), shapes)
    words = -(-rows // max(1, 32 // args.bits))
    return Part(("I32", "I8"), ((words, groups_of_columns(args, columns)), *shapes))


def _inputs(inputs: Args | None) -> dict[str, Part]:
    if inputs is None or inputs.dynamic:
        return {}
    if inputs.strategy == "tensor_group":
        return {"input_global_scale": Part(("F32",), ((1,), ()))}
    parts = {"input_scale": Part(FLOATS, ((1,), (), (1, 1)))}
    if not inputs.symmetric:
        parts["input_zero_point"] = Part(("I8", "U8", "I32"), ((1,), (), (1, 1)))
    return parts


def layouts(inventory: Inventory) -> Iterator[tuple[str, Layout, Mapping[str, Entry]]]:
    """Yield every module whose layout is known, with its parts on disk."""
    for name, group in inventory.groups.items():
        layout = layout_of(group, inventory.modules[name])
        if layout is not None:
            yield name, layout, inventory.modules[name]


def _missing(inventory: Inventory) -> Iterator[Place]:
    for name, group in inventory.groups.items():
        parts = inventory.modules[name]
        if group.weights is None or format_of(group) not in FORMATS:
            continue
        layout = layout_of(group, parts)
        needed = layout.parts if layout else _weight(format_of(group), group.weights, 0, 0)
        for part in needed:
            if part not in parts and part not in ("weight_zero_point", *_inputs(group.inputs)):
                value = f"is missing; {name.rpartition('.')[2]} has {', '.join(sorted(parts))}"
                yield Place(f"{name}.{part}", value, f"a tensor: {format_of(group)}")


def _missing_inputs(inventory: Inventory) -> Iterator[Place]:
    for name, group in inventory.groups.items():
        for part in _inputs(group.inputs):
            if part not in inventory.modules[name]:
                yield Place(f"{name}.{part}", "is missing", "a scale: inputs are static")


def _unexpected(inventory: Inventory) -> Iterator[Place]:
    for name, layout, parts in layouts(inventory):
        for part in sorted(parts.keys() - layout.parts.keys() - ALWAYS - OTHERS):
            yield Place(f"{name}.{part}", "is in the file", f"only {', '.join(layout.parts)}")


def _orphans(inventory: Inventory) -> Iterator[Place]:
    """Scales of modules that have no weight."""
    for name, parts in inventory.modules.items():
        scales = [part for part in parts if part.startswith(("weight_scale", "weight_global"))]
        if scales and not parts.keys() & {"weight", "weight_packed", "qweight"}:
            yield Place(f"{name}.{scales[0]}", "is the scale of no weight", "a weight beside it")


def _dtypes(inventory: Inventory) -> Iterator[Place]:
    for name, layout, parts in layouts(inventory):
        for part, wanted in layout.parts.items():
            if part in parts and parts[part].dtype not in wanted.dtypes:
                yield Place(f"{name}.{part}", parts[part].dtype, " or ".join(wanted.dtypes))


def _shapes(inventory: Inventory) -> Iterator[Place]:
    for name, layout, parts in layouts(inventory):
        for part, wanted in layout.parts.items():
            if part in parts and wanted.shapes and parts[part].shape not in wanted.shapes:
                expected = " or ".join(str(list(shape)) for shape in wanted.shapes)
                yield Place(f"{name}.{part}", str(list(parts[part].shape)), expected)


def _bytes(inventory: Inventory) -> Iterator[Place]:
    """Named formats that do not match the stored bytes."""
    named = _named_by_modelopt(inventory)
    if not named or inventory.resolver is not None:
        return
    for name in inventory.quantized:
        parts = inventory.modules[name]
        weight = parts.get("weight", parts.get("weight_packed"))
        expected = MODELOPT_WEIGHTS.get(named)
        if weight is not None and expected is not None and weight.dtype != expected:
            yield Place(name, f"{weight.dtype}, and the config says {named}", expected)
        elif named == "NVFP4" and "weight_scale_2" not in parts:
            yield Place(f"{name}.weight_scale_2", "is missing", "the global scale of NVFP4")


# The dtype in which Model-Optimizer stores weights, by format.
MODELOPT_WEIGHTS = {"NVFP4": "U8", "NVFP4_AWQ": "U8", "FP8": "F8_E4M3", "FP8_PB_WO": "F8_E4M3"}


def _named_by_modelopt(inventory: Inventory) -> str:
    inner = inventory.document("hf_quant_config.json").get("quantization")
    said = inner.get("quant_algo") if isinstance(inner, dict) else None
    own = inventory.config.get("quantization_config")
    if said is None and isinstance(own, dict):
        said = own.get("quant_algo")
    return said if isinstance(said, str) else ""


def _unknown(inventory: Inventory) -> Iterator[Place]:
    quantization = inventory.quantization
    if quantization is None:
        return
    for group in quantization.groups:
        form = group.format
        if form and form not in FORMATS and form not in ("mixed-precision", "dense"):
            yield Place(f"{group.name}.format", form, " or ".join(FORMATS), "config.json")
    if quantization.has_transforms:
        value = "has transforms, so weights are not the base's"
        yield Place("transform_config", value, "no transform, to be compared", "config.json")


def _fp8_kind(inventory: Inventory) -> Iterator[Place]:
    for name, entry in inventory.tensors.items():
        if entry.dtype.endswith("FNUZ"):
            yield Place(name, entry.dtype, entry.dtype.removesuffix("FNUZ"))


def _fused_on_disk(inventory: Inventory) -> Iterator[Place]:
    """A single scale for a layer that is fused on disk: vLLM expects one per shard."""
    for name, group in inventory.groups.items():
        scale = inventory.modules[name].get("weight_scale")
        own = name.rpartition(".")[2]
        if own in ("qkv_proj", "gate_up_proj", "query_key_value") and scale and scale.count == 1:
            yield Place(f"{name}.weight_scale", f"is one scale ({group.name})", "one a shard")


RULES = (
    Rule(
        "tensor-missing",
        "error",
        "vLLM serves what memory held before in place of a tensor that it does not find.",
        "vllm#57108: 43 layers of a 274B repack; vllm#54444, compressed-tensors#854",
        _missing,
    ),
    Rule(
        "input-scale-missing",
        "error",
        "A static input without its scale gives infinities or NaN, depending on the prompt.",
        "vllm#45212, compressed-tensors#595: experts that calibration never reached",
        _missing_inputs,
    ),
    Rule(
        "tensor-unexpected",
        "warning",
        "A tensor that the format does not have is dropped, or taken for another format's.",
        "compressed-tensors#820: a stray global scale",
        _unexpected,
    ),
    Rule(
        "scale-orphan",
        "error",
        "A scale without a weight belongs to a module that was lost or renamed.",
        "sglang#37679",
        _orphans,
    ),
    Rule(
        "tensor-dtype",
        "error",
        "Bytes of another dtype are read as numbers that nobody stored.",
        "compressed-tensors#820; Model-Optimizer#868",
        _dtypes,
    ),
    Rule(
        "tensor-shape",
        "error",
        "Scales of another count than groups, or codes of another width, apply to other weights.",
        "vllm#53242, llm-compressor#1704",
        _shapes,
    ),
    Rule(
        "format-bytes",
        "error",
        "The config names a format that the bytes are not of.",
        "Model-Optimizer#868: NVFP4 by name, FP8 by its bytes",
        _bytes,
    ),
    Rule(
        "format-unknown",
        "warning",
        "What has no layout here is not checked any further.",
        "formats newer than this audit",
        _unknown,
    ),
    Rule(
        "fp8-kind",
        "error",
        "FNUZ codes stand for half of what OCP's do, and their NaN is another's -0.",
        "vllm#45562, vllm#50467: GSM8K .9666 to .0099 on ROCm",
        _fp8_kind,
    ),
    Rule(
        "fused-on-disk",
        "warning",
        "vLLM has a scale for each shard of a fused layer; versions left all but one unwritten.",
        "vllm#39764, vllm#39765",
        _fused_on_disk,
    ),
)
