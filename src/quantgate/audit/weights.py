"""Rules that judge the comparison of weights with the base's, made in `beside_base`.

Measured on llm-compressor's and the embedded checkpoints: rounding to nearest is within 0.9 dB of
this audit's own rounding (3.5 dB in the worst group) and within 0.0022 in size; so is AWQ, once
its rescaling is undone. GPTQ's error is 2.2 to 4.5 dB above, 5.9 in the worst group, and within
0.0012 in size. Exchanged weights are over 20 dB above; a scale × 1.02 is off by 0.02 in size.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator

import numpy as np

from quantgate.audit.beside_base import (
    NORM,
    RATIO,
    SMALL,
    Compared,
    base_weight,
    comparisons,
    differs,
    looks_like,
    partner_of,
)
from quantgate.audit.decode import Floats, is_float, read_floats, same_bytes
from quantgate.audit.finding import Place, Rule
from quantgate.audit.headers import Entry
from quantgate.audit.inventory import QUANTIZED_PARTS, SCALE_PARTS, Inventory
from quantgate.audit.safety import recipe_of

# dB above the error of rounding to nearest: for a whole weight; for its worst group; and for a
# group when the rest of the weight matches rounding.
WORST, WORST_GROUP, WORST_GROUP_OF_ROUNDED = 9.0, 12.0, 7.0
ROUNDED = 1.0
# Share of the error that factors explain, of rows or of groups: rounding's own is below 0.02.
COHERENCE = 0.15
# Logarithm of a factor by which 4-bit rounding moves no channel of all linears after a norm alike.
CHANNEL = 0.1
# Scales stretch rows; a row with the wrong codes is not a multiple of the right one.
STRETCHED = 0.3
# What quantization adds to modules that the base has, and to attention.
ADDED = QUANTIZED_PARTS | SCALE_PARTS | {"inv_freq"}
CALIBRATED = ("GPTQModifier", "AWQModifier", "AutoRoundModifier", "SmoothQuantModifier")


def _wrong(compared: Compared) -> bool:
    found = compared.likeness
    limit = WORST_GROUP_OF_ROUNDED if found.excess < ROUNDED else WORST_GROUP
    return found.excess > WORST or found.worst > limit


def _wrong_scales(compared: Compared) -> bool:
    """Whether a weight is the base's times factors: a single one, or one per row."""
    found = compared.likeness
    if compared.group is None or not found.finite or found.row_ratios.min() < STRETCHED:
        return False
    factor = found.factor
    but_for_it = found.nearest_snr - found.snr_but_for_a_factor
    one = abs(factor - 1) > RATIO and but_for_it < WORST
    alike = bool(np.abs(found.row_ratios / factor - 1).max() < STRETCHED)
    return (one and alike) or max(found.coherence, found.coherence_of_groups) > COHERENCE


def _exchanged(inventory: Inventory) -> Iterator[Place]:
    for name, compared in comparisons(inventory).items():
        if _wrong(compared) and (other := looks_like(inventory, name)):
            yield Place(name, f"holds the base's {other}", "its own weight")


def _differ(inventory: Inventory) -> Iterator[Place]:
    for name, compared in comparisons(inventory).items():
        found = compared.likeness
        if not found.finite or not _wrong(compared) or _wrong_scales(compared):
            continue
        if looks_like(inventory, name):
            continue
        value = f"{found.snr:.1f} dB from the base's, cosine {found.cosine:.4f}, row {found.row}"
        if found.excess <= WORST:
            value = f"row {found.row} is {found.worst:.1f} dB further off than rounding leaves it"
        usual = "the same" if compared.group is None else f"{found.nearest_snr:.1f} dB, as rounded"
        yield Place(f"{name}.weight", value, usual)


def _scales(inventory: Inventory) -> Iterator[Place]:
    for name, compared in comparisons(inventory).items():
        if not _wrong_scales(compared):
            continue
        found = compared.likeness
        value = f"weights are {found.factor:.4f} of the base's"
        if found.coherence > COHERENCE and abs(found.factor - 1) < 0.2:
            spread = float(np.abs(found.row_ratios - 1).mean())
            value = f"rows are off by factors, {spread:.2%} on average"
        elif found.coherence_of_groups > COHERENCE:
            value = f"factors of its groups explain {found.coherence_of_groups:.0%} of its error"
        yield Place(f"{name}.weight_scale", value, "scales of these codes")


def _not_finite(inventory: Inventory) -> Iterator[Place]:
    for name, compared in comparisons(inventory).items():
        if not compared.likeness.finite:
            yield Place(f"{name}.weight", "is not finite", "finite weights")


def _norms(inventory: Inventory) -> Iterator[Place]:
    """Norms that differ from the base's without weights that compensate."""
    after: dict[str, list[Compared]] = {}
    for compared in comparisons(inventory).values():
        if compared.norm:
            after.setdefault(compared.norm, []).append(compared)
    for name in inventory.tensors:
        if not NORM.search(name) or not differs(inventory, name):
            continue
        linears = after.get(name, [])
        judged = [c for c in linears if not (_wrong(c) and looks_like(inventory, c.name))]
        bad = next((linear.name for linear in judged if not linear.makes_up), None)
        off = [linear for linear in judged if _is_off(inventory, linear)]
        difference = _difference(inventory, name)
        if not linears:
            yield Place(name, difference, "the base's")
        elif bad is not None:
            value = f"{difference}, which {bad} does not make up for"
            yield Place(name, value, "the base's, or weights that undo it")
        elif len(off) == len(judged) > 1:
            value = f"{difference}, and every linear after it is off"
            yield Place(name, value, "the inverse of what the linears' columns were multiplied by")
        elif (channel := _channel_off(judged)) is not None:
            value = f"{difference}, and every linear after it is off in channel {channel}"
            yield Place(name, value, "the inverse of what the linears' columns were multiplied by")


def _is_off(inventory: Inventory, linear: Compared) -> bool:
    partner = comparisons(inventory).get(partner_of(linear.name))
    if linear.factors == "rows" and partner is not None:
        # What is left of the product of both may be either's.
        product = linear.likeness.factor * partner.likeness.factor
        if abs(product - 1) > RATIO:
            return True
    return _wrong(linear) or _wrong_scales(linear)


def _channel_off(linears: list[Compared]) -> int | None:
    """Return the channel of a norm by which all linears after it are off alike, if there is one."""
    if len(linears) < 2:
        return None
    ratios = [np.maximum(linear.likeness.column_ratios, 1e-3) for linear in linears]
    logs = np.stack([np.log(each / np.median(each)) for each in ratios])
    alike = np.where((logs > 0).all(axis=0) | (logs < 0).all(axis=0), np.abs(logs).min(axis=0), 0)
    channel = int(np.argmax(alike))
    return channel if alike[channel] > CHANNEL else None


def _difference(inventory: Inventory, name: str) -> str:
    if inventory.tensors[name].count > SMALL:
        return "has other bytes"
    own, base = read_floats(inventory.tensors[name]), _base(inventory, name)
    ratio = own / np.where(base == 0, 1, base)
    usual, spread = float(ratio.mean()), float(np.ptp(ratio))
    if spread < 0.02 * abs(usual):
        return f"is {usual:.3f} times the base's"
    return f"differs by up to {float(np.abs(own - base).max()):.3g}"


def _base(inventory: Inventory, name: str) -> Floats:
    return read_floats((inventory.base or inventory).tensors[name])


def _tensors(inventory: Inventory) -> Iterator[Place]:
    """Embeddings, biases and everything else that is neither a linear nor a norm."""
    compared = comparisons(inventory)
    for name, entry in inventory.tensors.items():
        module, _, part = name.rpartition(".")
        is_linear = part == "weight" and module in compared
        if NORM.search(name) or is_linear or not is_float(entry.dtype):
            continue
        if part in QUANTIZED_PARTS or not differs(inventory, name):
            continue
        if part == "bias" and _is_scaled(compared.get(module), inventory, name):
            continue
        yield Place(name, _difference(inventory, name), "the base's")


def _is_scaled(compared: Compared | None, inventory: Inventory, name: str) -> bool:
    """Whether a bias is scaled like its linear's rows."""
    if compared is None or compared.factors != "rows":
        return False
    own, base = read_floats(inventory.tensors[name]), _base(inventory, name)
    expected = base * compared.likeness.row_ratios
    return bool(np.allclose(own, expected, rtol=0.1, atol=1e-3))


def _missing(inventory: Inventory) -> Iterator[Place]:
    base = inventory.base
    if base is None or not base.tensors or not inventory.tensors:
        return
    for name in base.tensors:
        module, _, part = name.rpartition(".")
        if name in inventory.tensors or (part == "weight" and _has_weight(inventory, module)):
            continue
        # A tensor of all experts may be stored expert by expert.
        one_by_one = name.rpartition(".experts.")[0] in _stacked(base, inventory)
        if not one_by_one and not (name == "lm_head.weight" and _head_is_embedding(inventory)):
            yield Place(name, "is missing", f"{_described(base.tensors[name])}, as the base has it")


def _head_is_embedding(inventory: Inventory) -> bool:
    """Whether a head that is not stored is the embedding in checkpoint and base alike."""
    if inventory.text_config.get("tie_word_embeddings") is not True or inventory.base is None:
        return False
    tensors = inventory.base.tensors
    embedding = next((e for n, e in tensors.items() if n.endswith("embed_tokens.weight")), None)
    is_tied = inventory.base.text_config.get("tie_word_embeddings") is True
    return is_tied or (embedding is not None and same_bytes(tensors["lm_head.weight"], embedding))


def _beyond(inventory: Inventory) -> Iterator[Place]:
    """Tensors that neither the base has nor quantization adds."""
    base = inventory.base
    if base is None or not base.tensors:
        return
    for name in inventory.tensors:
        module, _, part = name.rpartition(".")
        is_quantizations = part in ADDED or (part != "bias" and base_weight(inventory, module))
        one_by_one = name.rpartition(".experts.")[0] in _stacked(base, inventory)
        if name not in base.tensors and not is_quantizations and not one_by_one:
            yield Place(name, "is in the file", "no such tensor, as in the base")


@functools.lru_cache(maxsize=2)
def _stacked(base: Inventory, inventory: Inventory) -> frozenset[str]:
    """Return modules whose experts are in one tensor here and in many there."""
    theirs, ours = (
        {
            (module, end[:1].isdigit())
            for module, _, end in (name.rpartition(".experts.") for name in one.tensors)
            if module
        }
        for one in (base, inventory)
    )
    return frozenset(module for module, each in theirs if (module, not each) in ours)


def _has_weight(inventory: Inventory, module: str) -> bool:
    return bool(inventory.modules.get(module, {}).keys() & {"weight_packed", "qweight", "weight"})


def _described(entry: Entry) -> str:
    return f"{entry.dtype} {list(entry.shape)}"


def _other_shapes(inventory: Inventory) -> Iterator[Place]:
    base = inventory.base
    for name, entry in inventory.tensors.items():
        theirs = base.tensors.get(name) if base else None
        if theirs is None or theirs.shape == entry.shape or "embed" in name:
            continue
        # Model-Optimizer and bitsandbytes keep two codes in a byte.
        is_packed = entry.dtype == "U8" and 2 * entry.count == theirs.count
        if name != "lm_head.weight" and not is_packed:
            yield Place(name, _described(entry), f"{_described(theirs)}, the base's")


def _not_compared(inventory: Inventory) -> Iterator[Place]:
    """Quantized linears in a format that is not dequantized here."""
    base = inventory.base.tensors if inventory.base else {}
    left_out = [
        name
        for name in inventory.quantized
        if f"{name}.weight" in base and name not in comparisons(inventory)
    ]
    for name in left_out[:1]:
        value = f"is not compared with the base's, and {len(left_out) - 1} more are not"
        yield Place(name, value, "a format that is dequantized here: compressed-tensors'")


def _no_calibration(inventory: Inventory) -> Iterator[Place]:
    """A recipe with calibration, but weights that equal plain rounding."""
    named = [name for name in CALIBRATED if name in recipe_of(inventory)]
    four_bits = [
        c
        for c in comparisons(inventory).values()
        if c.group is not None and c.group.weights is not None and c.group.weights.bits == 4
    ]
    plain = [c for c in four_bits if abs(c.likeness.excess) < 0.05 and not (c.norm or c.factors)]
    for compared in plain if named and len(plain) == len(four_bits) else ():
        value = f"is what rounding to nearest gives, {compared.likeness.snr:.2f} dB"
        yield Place(compared.name, value, f"weights that {', '.join(named)} moved")


RULES = (
    Rule(
        "missing-beside-base",
        "error",
        "vLLM does not miss every tensor: it serves an input_layernorm as memory held it.",
        "vllm#57108, sglang#37679",
        _missing,
        needs="base",
    ),
    Rule(
        "beyond-base",
        "error",
        "A tensor that the base has not is dropped, or takes part in what is computed.",
        "compressed-tensors#820; checkpoints put together from two models",
        _beyond,
        needs="base",
    ),
    Rule(
        "shape-beside-base",
        "error",
        "A tensor of another shape than the base's belongs to another model.",
        "checkpoints put together from two models",
        _other_shapes,
        needs="base",
    ),
    Rule(
        "weights-exchanged",
        "error",
        "A linear with another's weight computes with it; engine and reference agree on that.",
        "gate and up projections exchanged while fusing",
        _exchanged,
        needs="weights",
    ),
    Rule(
        "weights-differ",
        "error",
        "A weight further from the base's than any rounding leaves it is another weight.",
        "vllm#35562: an exponent offset applied twice, perplexity 22,953",
        _differ,
        needs="weights",
    ),
    Rule(
        "weight-scale",
        "error",
        "Scales that are not those of the codes stretch a layer, a little or a lot.",
        "modular#6600, compressed-tensors#538, compressed-tensors#541",
        _scales,
        needs="weights",
    ),
    Rule(
        "weight-not-finite",
        "error",
        "FP8 codes that are NaN make every output of their row so.",
        "FNUZ codes read as OCP's: 0x7F",
        _not_finite,
        needs="weights",
    ),
    Rule(
        "norm-differs",
        "error",
        "A norm that is not the base's, with no weight that makes up for it, scales a layer.",
        "llm-compressor#2500: smoothing that ignored the norm's 1 + w",
        _norms,
        needs="weights",
    ),
    Rule(
        "tensor-differs",
        "error",
        "Embeddings, heads and biases are not quantized and must be the base's.",
        "llm-compressor#2798: a head saved from the wrong module",
        _tensors,
        needs="weights",
    ),
    Rule(
        "calibration-no-op",
        "warning",
        "The recipe names a method that moves weights, and none has moved.",
        "llm-compressor#2084, llm-compressor#2833, llm-compressor#2855: silent no-ops",
        _no_calibration,
        needs="weights",
    ),
    Rule(
        "weights-not-compared",
        "warning",
        "What is not compared may be anything: a pass says nothing of these weights.",
        "Model-Optimizer's, GPTQ's and AWQ's own formats",
        _not_compared,
        needs="weights",
    ),
)
