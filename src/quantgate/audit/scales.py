"""Rules about the values of scales, zero points and KV-cache scales."""

from __future__ import annotations

import re
import statistics
from collections import defaultdict
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from quantgate.audit.decode import read_floats, same_bytes
from quantgate.audit.finding import Place, Rule
from quantgate.audit.inventory import LAYER, Inventory
from quantgate.audit.layout import NVFP4, format_of, layout_of
from quantgate.audit.quantization import Args, Group, fused_names

# Largest code of each kind.
FP8_MAX, FP4_MAX = 448.0, 6.0
# The largest weight of a language model's linear is between 0.01 and a few hundred.
LARGEST_WEIGHT, SMALLEST_WEIGHT = 1e4, 1e-6
FP16_MAX = 65504.0
# A layer's median scale beside its neighbours': real ones stay within one power of ten.
OUTLIER = 30.0
WORTH_COMPARING = 64
ATTENTION = re.compile(r"^(.*(?:self_attn|attention|attn))\.(?:k_proj|qkv_proj)$")


def _not_finite(inventory: Inventory) -> Iterator[Place]:
    for name, spread in inventory.spreads.items():
        if spread.not_finite:
            yield Place(name, f"{spread.not_finite} of {spread.count} not finite", "finite scales")


def _not_positive(inventory: Inventory) -> Iterator[Place]:
    for name, spread in inventory.spreads.items():
        if spread.negative or spread.zero:
            value = f"{spread.negative} negative, {spread.zero} zero of {spread.count}"
            yield Place(name, value, "positive scales")


def _outliers(inventory: Inventory) -> Iterator[Place]:
    """Scales whose median is far from that of the same module's in other layers."""
    kinds: dict[str, list[tuple[str, float]]] = defaultdict(list)
    for name, spread in inventory.spreads.items():
        if LAYER.search(name) and spread.median > 0:
            kinds[re.sub(r"\.\d+\.", ".*.", name)].append((name, spread.median))
    for medians in kinds.values():
        usual = statistics.median(value for _, value in medians)
        for name, value in medians if len(medians) > 2 else ():
            if not 1 / OUTLIER < value / usual < OUTLIER:
                yield Place(name, f"median {value:.3g}", f"about {usual:.3g}, as in other layers")


def _magnitude(inventory: Inventory) -> Iterator[Place]:
    """The largest weight that scales and codes can represent."""
    for name, group in inventory.groups.items():
        largest = _largest_weight(inventory, name, group)
        if largest is not None and not SMALLEST_WEIGHT < largest < LARGEST_WEIGHT:
            value = f"weights up to {largest:.3g}"
            yield Place(name, value, f"between {SMALLEST_WEIGHT:g} and {LARGEST_WEIGHT:g}")


def _fp16(inventory: Inventory) -> Iterator[Place]:
    dtype = inventory.config.get("dtype", inventory.config.get("torch_dtype"))
    if dtype != "float16":
        return
    for name, group in inventory.groups.items():
        largest = _largest_weight(inventory, name, group)
        if largest is not None and largest > FP16_MAX:
            yield Place(name, f"weights up to {largest:.3g}", f"at most {FP16_MAX:g} in float16")


def _largest_weight(inventory: Inventory, name: str, group: Group) -> float | None:
    spread = inventory.spreads.get(f"{name}.weight_scale")
    if spread is None or spread.not_finite or group.weights is None:
        return None
    largest = spread.largest * _largest_code(group.weights)
    divisor = inventory.spreads.get(f"{name}.weight_global_scale")
    if divisor is not None and format_of(group) == NVFP4:
        return largest / divisor.largest if divisor.largest > 0 else None
    return largest


def _largest_code(args: Args) -> float:
    if args.kind == "float":
        return FP4_MAX if args.bits == 4 else FP8_MAX
    return float(2 ** (args.bits - 1) if args.symmetric else 2**args.bits - 1)


def _copied(inventory: Inventory) -> Iterator[Place]:
    """Modules with the same scales as some other module, but different codes."""
    seen: dict[tuple[tuple[int, ...], bytes], str] = {}
    for name, spread in inventory.spreads.items():
        own = name.rpartition(".")[2]
        entry = inventory.tensors[name]
        if not own.startswith("weight_scale") or spread.count < WORTH_COMPARING:
            continue
        if spread.smallest == spread.largest or spread.not_finite:
            continue
        other = seen.setdefault((entry.shape, spread.digest), name)
        if other != name and same_bytes(entry, inventory.tensors[other]):
            if not _same_codes(inventory, name, other):
                yield Place(name, f"is, byte for byte, {other}", "scales of its own")


def _same_codes(inventory: Inventory, name: str, other: str) -> bool:
    one, two = (inventory.modules[n.rpartition(".")[0]] for n in (name, other))
    codes = [
        (one[part], two[part])
        for part in ("weight_packed", "weight")
        if part in one.keys() & two.keys()
    ]
    return bool(codes) and all(same_bytes(a, b) for a, b in codes)


def _fused(inventory: Inventory) -> Iterator[Place]:
    """Scales that differ although vLLM uses a single one for the fused layer."""
    for shards in fused_names(inventory.groups).values():
        for part in ("weight_global_scale", "input_global_scale", "input_scale"):
            each = {n: inventory.spreads.get(f"{n}.{part}") for n in shards}
            values = {n: spread.largest for n, spread in each.items() if spread is not None}
            if len(set(values.values())) > 1 and not _takes_largest(
                inventory.groups[shards[0]], part
            ):
                value = ", ".join(f"{n.rpartition('.')[2]} {v:g}" for n, v in values.items())
                yield Place(f"{min(values)}.{part}", value, "equal ones: vLLM takes one for all")


def _takes_largest(group: Group, part: str) -> bool:
    """FP8 inputs have range to spare: vLLM uses the largest scale, and nothing saturates."""
    return part == "input_scale" and group.inputs is not None and group.inputs.kind == "float"


def _default(inventory: Inventory) -> Iterator[Place]:
    """Static input scales that calibration left at one."""
    scales = {
        name: spread.largest
        for name, spread in inventory.spreads.items()
        if name.endswith((".input_scale", ".input_global_scale"))
    }
    ones = [name for name, value in scales.items() if value == 1.0]
    for name in ones if len(ones) > 1 else ():
        yield Place(name, f"1, as {len(ones)} of {len(scales)} are", "a calibrated scale")


def _kv_missing(inventory: Inventory) -> Iterator[Place]:
    quantization = inventory.quantization
    if quantization is None or quantization.kv_cache is None or quantization.kv_cache.dynamic:
        return
    for name in inventory.modules:
        if match := ATTENTION.match(name):
            attention = match.group(1)
            for kind in ("k", "v"):
                if not any(n in inventory.tensors for n in _kv_names(attention, kind)):
                    yield Place(
                        f"{attention}.{kind}_scale", "is missing", "a scale: kv_cache_scheme"
                    )


def _kv_names(attention: str, kind: str) -> tuple[str, ...]:
    own = f"{attention}.{kind}"
    return f"{own}_scale", f"{own}_proj.{kind}_scale", f"{own}_proj.output_scale"


def _kv_default(inventory: Inventory) -> Iterator[Place]:
    scales = {
        n: s.largest for n, s in inventory.spreads.items() if n.endswith(("k_scale", "v_scale"))
    }
    if scales and set(scales.values()) == {1.0}:
        yield Place(min(scales), f"1, as all {len(scales)} are", "calibrated scales")


def _kv_unused(inventory: Inventory) -> Iterator[Place]:
    quantization = inventory.quantization
    if (
        quantization is not None
        and quantization.is_compressed_tensors
        and not quantization.kv_cache
    ):
        for name in [n for n in inventory.tensors if n.endswith((".k_scale", ".v_scale"))][:1]:
            yield Place(name, "is in the file", "a kv_cache_scheme that says so", "config.json")


def _zero_missing(inventory: Inventory) -> Iterator[Place]:
    for name, group in inventory.groups.items():
        asymmetric = group.weights is not None and not group.weights.symmetric
        if asymmetric and "weight_zero_point" not in inventory.modules[name]:
            yield Place(f"{name}.weight_zero_point", "is missing", "a zero point: asymmetric")
        static = group.inputs is not None and not (group.inputs.dynamic or group.inputs.symmetric)
        if static and "input_zero_point" not in inventory.modules[name]:
            yield Place(f"{name}.input_zero_point", "is missing", "a zero point: asymmetric")


def _zero_range(inventory: Inventory) -> Iterator[Place]:
    for name, group in inventory.groups.items():
        for part, args in (
            ("weight_zero_point", group.weights),
            ("input_zero_point", group.inputs),
        ):
            entry = inventory.modules[name].get(part)
            if entry is None or args is None or not entry.count or entry.dtype != "I8":
                continue
            low, high = -(2 ** (args.bits - 1)), 2 ** (args.bits - 1) - 1
            values = read_floats(entry)
            if float(values.min()) < low or float(values.max()) > high:
                value = f"{values.min():g} to {values.max():g}"
                yield Place(f"{name}.{part}", value, f"{low} to {high}")


def _g_idx(inventory: Inventory) -> Iterator[Place]:
    """Column groups that act-order refers to and that do not exist."""
    for name, group in inventory.groups.items():
        entry = inventory.modules[name].get("weight_g_idx")
        layout = layout_of(group, inventory.modules[name])
        if entry is None or layout is None or not entry.count or group.weights is None:
            continue
        values, size = read_floats(entry), group.weights.group_size or layout.columns
        if bool((values == -1).all()):
            continue  # how compressed-tensors writes "none"
        last = -(-layout.columns // size) - 1
        if values.min() < 0 or values.max() > last:
            value = f"{values.min():g} to {values.max():g}"
            yield Place(f"{name}.weight_g_idx", value, f"0 to {last}")


def _gptq_zeros(inventory: Inventory) -> Iterator[Place]:
    """GPTQ's first format stores the zero point minus one, its second the zero point itself."""
    said = inventory.config.get("quantization_config")
    if inventory.quantization is None or not isinstance(said, dict):
        return
    if inventory.quantization.method != "gptq" or said.get("bits") not in (2, 4, 8):
        return
    bits, second = said["bits"], said.get("checkpoint_format") == "gptq_v2"
    for name, parts in inventory.modules.items():
        zeros = parts.get("qzeros")
        if zeros is None or zeros.dtype != "I32" or not zeros.count:
            continue
        codes = np.concatenate([_unpacked(raw.view("<u4"), bits) for raw in zeros.chunks()])
        middle = 1 << (bits - 1)
        usual = middle if second else middle - 1
        if said.get("sym") is not False and not (codes == usual).all():
            value = f"{codes.min()} to {codes.max()}, {said.get('checkpoint_format', 'gptq')}"
            yield Place(f"{name}.qzeros", value, f"{usual}: symmetric")
        elif not second and (codes == (1 << bits) - 1).any():
            count = int((codes == (1 << bits) - 1).sum())
            value = f"{count} are {(1 << bits) - 1}, which is 0 less one, wrapped"
            yield Place(f"{name}.qzeros", value, "no zero point of 0 in this format")


def _unpacked(words: NDArray[np.uint32], bits: int) -> NDArray[np.uint8]:
    shifts = np.arange(32 // bits, dtype=np.uint32) * np.uint32(bits)
    codes = (words[:, None] >> shifts) & np.uint32((1 << bits) - 1)
    return codes.astype(np.uint8).reshape(-1)


RULES = (
    Rule(
        "scale-not-finite",
        "error",
        "One scale that is NaN or infinite makes whole rows of a layer's output so.",
        "vllm#45212, llm-compressor#2826: 14 of 92,400 scales were infinite",
        _not_finite,
    ),
    Rule(
        "scale-not-positive",
        "error",
        "A scale of zero erases its group, a negative one mirrors it; unwritten memory has both.",
        "vllm#54444, compressed-tensors#854: uninitialized NVFP4 scales",
        _not_positive,
    ),
    Rule(
        "scale-outlier",
        "warning",
        "A layer's scales that are far from its neighbours' were computed from something else.",
        "llm-compressor#2826",
        _outliers,
    ),
    Rule(
        "weight-magnitude",
        "error",
        "A global scale inverted (a divisor here, a factor in Model-Optimizer) gives such weights.",
        "kekzl/imp#1433, modular#6600",
        _magnitude,
    ),
    Rule(
        "fp16-overflow",
        "error",
        "Weights beyond float16's range are infinite when served in it.",
        "vllm#33972, vllm#14126",
        _fp16,
    ),
    Rule(
        "scale-copied",
        "error",
        "Two layers never have the same scales: one of them has lost its own.",
        "repacked checkpoints; the effect is too small for accuracy gates",
        _copied,
    ),
    Rule(
        "fused-scales",
        "error",
        "vLLM takes one scale for all shards of a fused layer; codes of the others no longer fit.",
        "llm-compressor#1869: Qwen3-30B NVFP4, 9600 / 12992 / 12160",
        _fused,
    ),
    Rule(
        "input-scale-default",
        "error",
        "Static input scales of exactly one were never calibrated.",
        "vllm#45212, llm-compressor#2826: calibration that did not reach all modules",
        _default,
    ),
    Rule(
        "kv-scale-missing",
        "error",
        "Without its scales an FP8 KV cache runs at 1.0 and clips in long contexts.",
        "vllm#54623, llm-compressor#2477: observers that missed self_attn",
        _kv_missing,
    ),
    Rule(
        "kv-scale-default",
        "error",
        "KV scales that are all exactly one were never calibrated.",
        "vllm#54623, vllm#25047, sglang#20705",
        _kv_default,
    ),
    Rule(
        "kv-scale-unused",
        "warning",
        "KV scales that the config does not mention are not loaded.",
        "vllm#54623: a checkpoint with 2.4 million downloads",
        _kv_unused,
    ),
    Rule(
        "zero-point-missing",
        "error",
        "Asymmetric codes without their zero point are all off by it.",
        "compressed-tensors#225, llm-compressor#1704",
        _zero_missing,
    ),
    Rule(
        "zero-point-range",
        "error",
        "A zero point beyond the codes' range is cut or wraps when it is packed.",
        "auto-round#2273",
        _zero_range,
    ),
    Rule(
        "group-index",
        "error",
        "Act-order that names a group which does not exist reads a scale out of bounds.",
        "vllm#7374, vllm#23256",
        _g_idx,
    ),
    Rule(
        "gptq-zero-point",
        "error",
        "GPTQ's two formats differ by one in every zero point.",
        "vllm#38966, vllm#26343; GPTQModel#2350",
        _gptq_zeros,
    ),
)
