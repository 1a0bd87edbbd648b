"""Compare every weight of a checkpoint with the base's, after undoing intended changes.

Quantization methods that beat plain rounding move weights. AWQ and SmoothQuant multiply a linear's
input channels by factors and divide what comes before by them: the norm, or the rows of the
previous linear. So it is not the weight that must equal the base's, but its product with what
comes before it:

- If a norm differs from the base's, the inverse of its change is sought in the columns of the
  linears after it. If it is found, the weights are compared with the base's times those factors; if
  not, the norm was changed without compensation.
- If the rows of `up_proj` or `v_proj` are scaled, the inverse is sought in the columns of
  `down_proj` or `o_proj`, which heads of queries that share a head of values have several times.

GPTQ moves codes to compensate for the errors of others, so its weights are 2 to 6 dB further from
the base's than rounding leaves them. It has no preferred direction, so the size of rows stays the
same, and real faults are further off than that: see `weights.py`.
"""

from __future__ import annotations

import dataclasses
import functools
import os
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from quantgate.audit.compare import GROUP, Doubles, Likeness, likeness
from quantgate.audit.decode import is_float, read_floats, same_bytes
from quantgate.audit.dequantize import (
    Nearest,
    StoredWeight,
    quantized_weight,
    rounding_to,
    whole_weight,
)
from quantgate.audit.headers import Entry
from quantgate.audit.inventory import LAYER, Inventory
from quantgate.audit.layout import Layout, layout_of
from quantgate.audit.quantization import Args, Group

# The norm before a linear, in the models' order.
NORM_BEFORE = (
    (
        re.compile(r"\.(?:(?:q|k|v|qkv|q_a|kv_a)_proj(?:_with_mqa)?|query_key_value)$"),
        ("input_layernorm",),
    ),
    (
        re.compile(r"\.(?:(?:gate|up|gate_up)_proj|mlp\.gate|shared_expert_gate)$"),
        ("pre_feedforward_layernorm", "post_attention_layernorm"),
    ),
)
# Linears whose row scales are undone by another linear's columns.
PARTNER = {"up_proj": "down_proj", "v_proj": "o_proj"}
# Models with norms that multiply by 1 + weight.
ONE_PLUS = re.compile(r"^(?:gemma|qwen3_next)")
NORM = re.compile(r"norm\.weight$", re.I)
# Relative spread of a norm's factors below which they are one factor: bfloat16 rounds each.
ONE_FACTOR = 0.01
# A norm or bias that was only rounded to a different dtype.
ROUNDING = 2.0**-7
SAMPLED_ROWS = 256
# Most elements of a tensor that is read whole.
SMALL = 1 << 22
# Correlation, in logarithms, of row factors with the column factors that undo them.
UNDOES = 0.8
# bfloat16 rounds a scale by 0.002 at most.
RATIO = 0.005
# dB: an unquantized weight is the base's, or the base's rounded to a different dtype.
WHOLE = 90.0
# Cosine with another weight: unrelated ones have 0.0, smoothed ones still 0.7.
LIKE = 0.5


@dataclass(frozen=True)
class Compared:
    """A linear compared with the base's."""

    name: str
    likeness: Likeness
    group: Group | None
    """None for an unquantized weight."""
    norm: str
    """The changed norm before it, if any."""
    makes_up: bool
    """Whether its columns undo that change."""
    factors: str
    """"rows" or "columns" if those were scaled and the partner undoes it."""


@dataclass(frozen=True)
class Pair:
    """A linear and its base, ready to be compared."""

    weight: StoredWeight
    base: StoredWeight
    group: Group | None
    layout: Layout | None
    parts: dict[str, Entry]

    def measure(self, rows: Doubles | None = None, columns: Doubles | None = None) -> Likeness:
        """Compare with the base after multiplying its rows and columns by factors."""
        args = self.group.weights if self.group else None
        if self.group is None or args is None:
            return likeness(
                self.weight,
                self.base,
                rounding_to(self.parts["weight"].dtype),
                ceiling=WHOLE,
                rows=rows,
                columns=columns,
            )
        amax = self._largest() if args.strategy == "tensor" else 0.0
        nearest = Nearest(self.group, self.parts, self.base.columns, amax)
        compare = functools.partial(
            likeness,
            self.weight,
            self.base,
            height=args.block[0] if args.block else 1,
            group_size=_unit(args),
            rows=rows,
            columns=columns,
        )
        found = compare(nearest)
        if abs(found.factor - 1) <= RATIO:
            return found
        # The largest weights of int4 lie between two codes, and quantizers differ in which they
        # take: where the scale was stored before it was used, its rounding decides.
        other = compare(dataclasses.replace(nearest, scales_as_stored=True))
        return min(found, other, key=lambda one: abs(one.factor - 1))

    def _largest(self) -> float:
        step = max(1, (1 << 21) // self.base.columns)
        ends = (self.base.read(f, min(f + step, self.base.rows)) for f in self._firsts(step))
        return max(float(np.abs(part).max()) for part in ends)

    def _firsts(self, step: int) -> range:
        return range(0, self.base.rows, step)


def _unit(args: Args) -> int:
    return args.group_size or GROUP


@functools.lru_cache(maxsize=1)
def comparisons(inventory: Inventory) -> dict[str, Compared]:
    """Compare every linear that the base has in the same shape; reads all of both checkpoints."""
    compared: dict[str, Compared] = {}
    names = list(_pairs(inventory))
    with ThreadPoolExecutor(_threads()) as threads:
        found = threads.map(functools.partial(_compare, inventory), names)
        for place, (name, one) in enumerate(zip(names, found, strict=True)):
            inventory.progress(name, place, len(names))
            compared[name] = one
    for name in names:
        partner = partner_of(name)
        if partner in compared and any(_stands_out(compared[n]) for n in (name, partner)):
            compared |= _together(inventory, compared[name], compared[partner])
    return compared


def _threads() -> int:
    """Return how many linears to compare at once: numpy lets other threads run as it computes.

    OMP_NUM_THREADS is this process's share of the machine, where workers run side by side.
    """
    share = os.environ.get("OMP_NUM_THREADS", "")
    return int(share) if share.isdecimal() and int(share) else len(os.sched_getaffinity(0))


def _pairs(inventory: Inventory) -> Iterator[str]:
    for name in inventory.modules if not inventory.is_rotated else ():
        if _pair(inventory, name) is not None:
            yield name


def _pair(inventory: Inventory, name: str) -> Pair | None:
    """Return a linear with its base, if both exist, fit, and differ in their bytes."""
    base = base_weight(inventory, name)
    parts = inventory.modules[name]
    if base is None or len(base.shape) != 2 or not base.count or not is_float(base.dtype):
        return None
    group = inventory.groups.get(name)
    if group is None:
        own = parts.get("weight")
        if own is None or own.shape != base.shape or not is_float(own.dtype):
            return None
        if own.dtype == base.dtype and same_bytes(own, base) and not _changed_norm(inventory, name):
            return None
        return Pair(whole_weight(own), whole_weight(base), None, None, parts)
    layout = layout_of(group, parts)
    if layout is None or base.shape != (layout.rows, layout.columns) or not _fits(layout, parts):
        return None
    return Pair(quantized_weight(parts, group, layout), whole_weight(base), group, layout, parts)


def base_weight(inventory: Inventory, name: str) -> Entry | None:
    """Return the weight that the base has for a linear: a head may be its embedding."""
    tensors = inventory.base.tensors if inventory.base else {}
    weight = tensors.get(f"{name}.weight")
    if weight is None and name.rpartition(".")[2] == "lm_head":
        return next((e for n, e in tensors.items() if n.endswith("embed_tokens.weight")), None)
    return weight


def _fits(layout: Layout, parts: dict[str, Entry]) -> bool:
    """Whether every tensor that dequantizing reads has the expected dtype and shape."""
    return all(
        part in parts
        and parts[part].dtype in wanted.dtypes
        and (not wanted.shapes or parts[part].shape in wanted.shapes)
        for part, wanted in layout.parts.items()
        if part.startswith("weight") and part != "weight_shape"
    )


@np.errstate(all="ignore")  # of this thread: a damaged file's values may be infinite or NaN
def _compare(inventory: Inventory, name: str) -> Compared:
    pair = _pair(inventory, name)
    if pair is None:
        raise ValueError(f"{name} has no pair")
    norm = _changed_norm(inventory, name)
    return _with_norm(inventory, pair, Compared(name, pair.measure(), pair.group, norm, False, ""))


def _with_norm(
    inventory: Inventory, pair: Pair, plain: Compared, rows: Doubles | None = None
) -> Compared:
    """Compare a linear with the base's, rows scaled; tell if its columns undo a changed norm."""
    kind = "" if rows is None else "rows"
    found = plain.likeness if rows is None else pair.measure(rows=rows)
    if not plain.norm:
        return Compared(plain.name, found, plain.group, "", False, kind)
    factors = norm_factors(inventory, plain.norm)
    made_up = pair.measure(rows=rows, columns=factors)
    is_one_factor = float(factors.std()) < ONE_FACTOR * abs(float(factors.mean()))
    makes_up = _spread(made_up, is_one_factor) < _spread(found, is_one_factor)
    likeness = made_up if makes_up else found
    return Compared(plain.name, likeness, plain.group, plain.norm, makes_up, kind)


def _spread(found: Likeness, is_one_factor: bool) -> float:
    """How far columns are from their expected size.

    Relative to each other, because rows may be scaled too; a norm scaled by a single factor shows
    only in absolute size.
    """
    usual = 1.0 if is_one_factor else float(np.median(found.column_ratios)) or 1.0
    return float(np.abs(found.column_ratios / usual - 1).mean())


def _together(inventory: Inventory, first: Compared, second: Compared) -> dict[str, Compared]:
    """Compare two linears, where the columns of one may undo the row scales of the other."""
    rows, each = first.likeness.row_ratios, second.likeness.column_ratios
    # Heads of queries share a head of values: [heads of values, heads of queries, head size].
    size = _head_size(inventory) if len(each) > len(rows) else len(rows)
    if len(each) % len(rows) or len(rows) % size:
        return {}
    heads = each.reshape(len(rows) // size, -1, size)
    columns = np.median(heads, axis=1).reshape(-1)
    known = (rows > 0) & (columns > 0)
    if known.sum() < len(rows) / 2:
        return {}
    if _correlation(np.log(rows[known]), -np.log(columns[known])) < UNDOES:
        return {}
    # A row has scales of its own, so its factor is known better than a column's.
    factors = np.where(known, rows, 1.0)
    found = _with_factors(inventory, (first, second), factors, heads.shape)
    left = [c.likeness.factor for c in found.values()]
    if found and abs(left[1] / left[0] - 1) > RATIO and left[1] / left[0] > 0:
        # Only their product is known: what is left of it may be either's.
        factors = factors * np.sqrt(left[0] / left[1])
        found = _with_factors(inventory, (first, second), factors, heads.shape)
    return found


def _with_factors(
    inventory: Inventory, pair: tuple[Compared, Compared], factors: Doubles, heads: tuple[int, ...]
) -> dict[str, Compared]:
    """Compare a linear whose rows have these factors, and the one whose columns undo them."""
    first, second = pair
    one, two = _pair(inventory, first.name), _pair(inventory, second.name)
    if one is None or two is None:
        return {}
    columns = np.broadcast_to(factors.reshape(heads[0], 1, heads[2]), heads).reshape(-1)
    after = two.measure(columns=1 / columns)
    return {
        first.name: _with_norm(inventory, one, first, factors),
        second.name: Compared(second.name, after, second.group, second.norm, False, "columns"),
    }


def _head_size(inventory: Inventory) -> int:
    heads, hidden = inventory.size("num_attention_heads"), inventory.size("hidden_size")
    return inventory.size("head_dim") or (hidden // heads if hidden and heads else 0) or 1


def _stands_out(compared: Compared) -> bool:
    """Whether a linear's weights may have been moved; `weights.py` decides if that is a fault."""
    found = compared.likeness
    return found.excess > 1 or found.coherence > 0.05


def _correlation(one: Doubles, other: Doubles) -> float:
    spreads = float(one.std() * other.std())
    return float(((one - one.mean()) * (other - other.mean())).mean()) / spreads if spreads else 0.0


def partner_of(name: str) -> str:
    """Return the linear whose columns may undo the scales of a linear's rows."""
    parent, dot, own = name.rpartition(".")
    return f"{parent}{dot}{PARTNER.get(own, '')}"


# --- norms ---------------------------------------------------------------------------------------


def norm_before(inventory: Inventory, name: str) -> str:
    """Return the norm whose output a linear takes, "" if unknown."""
    match = LAYER.search(name)
    for pattern, norms in NORM_BEFORE if match else ():
        if match and pattern.search(name):
            candidates = (f"{name[: match.end()]}{norm}.weight" for norm in norms)
            return next((n for n in candidates if n in inventory.tensors), "")
    return ""


def _changed_norm(inventory: Inventory, name: str) -> str:
    norm = norm_before(inventory, name)
    return norm if norm and differs(inventory, norm) else ""


def differs(inventory: Inventory, name: str) -> bool:
    """Whether a small tensor differs from the base's by more than rounding to another dtype."""
    own = inventory.tensors[name]
    base = inventory.base.tensors.get(name) if inventory.base else None
    if inventory.is_rotated or base is None or base.shape != own.shape or not own.count:
        return False
    if own.dtype == base.dtype:
        return not same_bytes(own, base)
    if own.count > SMALL:
        return False  # different dtypes and a large tensor: not worth the memory
    one, other = read_floats(own), read_floats(base)
    return bool((np.abs(one - other) > ROUNDING * np.abs(other) + 1e-6).any())


def norm_factors(inventory: Inventory, norm: str) -> Doubles:
    """Return the factors of the columns after a changed norm that compensate for the change."""
    offset = 1.0 if ONE_PLUS.match(str(inventory.text_config.get("model_type"))) else 0.0
    base = inventory.base or inventory
    own = read_floats(inventory.tensors[norm]).astype(np.float64).reshape(-1) + offset
    theirs = read_floats(base.tensors[norm]).astype(np.float64).reshape(-1) + offset
    return np.divide(theirs, own, out=np.ones_like(own), where=np.abs(own) > 0)


# --- exchanged weights ---------------------------------------------------------------------------


def looks_like(inventory: Inventory, name: str) -> str | None:
    """Return the base's linear whose weight a module holds, if it is not the module's own."""
    pair = _pair(inventory, name)
    if pair is None or inventory.base is None:
        return None
    last = min(SAMPLED_ROWS, pair.base.rows)
    own = pair.weight.read(0, last)
    size = float(np.linalg.norm(own))
    for other in _same_shape(inventory, name, (pair.base.rows, pair.base.columns)):
        theirs = whole_weight(inventory.base.tensors[f"{other}.weight"]).read(0, last)
        product = float(np.vdot(own, theirs))
        if size and product > LIKE * size * float(np.linalg.norm(theirs)):
            return other
    return None


def _same_shape(inventory: Inventory, name: str, shape: tuple[int, int]) -> Iterator[str]:
    """Yield the base's linears of a shape: those in the same layer, then those of the same kind."""
    base = inventory.base or inventory
    match = LAYER.search(name)
    layer, own = (name[: match.end()], name[match.end() :]) if match else ("", name)
    others = [
        m
        for m, p in base.modules.items()
        if m != name
        and "weight" in p
        and p["weight"].shape == shape
        and is_float(p["weight"].dtype)
    ]
    yield from (other for other in others if layer and other.startswith(layer))
    yield from (o for o in others if not (layer and o.startswith(layer)) and o.endswith(own))
