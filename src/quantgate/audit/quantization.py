"""A checkpoint's `quantization_config`, read without trusting it, and each module's group.

The two libraries that read it resolve `targets` and `ignore` differently (compressed-tensors
0.17, `utils/match.py`; vLLM 0.32, `layers/quantization/compressed_tensors/utils.py`):

| | compressed-tensors | vLLM |
|---|---|---|
| order of targets | names, expressions alphabetically, classes | names, fused names, classes |
| a class | equal | contained in, ignoring case |
| q/k/v, gate/up | one by one | as one layer, which all shards must match |
"""

from __future__ import annotations

import functools
import re
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeGuard

LINEAR = "Linear"
# vLLM's class for a linear, by the shards fused in it.
VLLM_CLASSES = {"qkv_proj": "QKVParallelLinear", "gate_up_proj": "MergedColumnParallelLinear"}
FUSED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
FUSED_INTO = {shards: name for name, shards in FUSED.items()} | {
    ("query", "key", "value"): "qkv_proj"  # a BERT's
}
STRATEGIES = ("tensor", "channel", "group", "block", "tensor_group", "token", "attn_head")
# An expression's time may grow as the name's length to the power of its number of repeats.
MOST_REPEATS = 6
NESTED_REPEATS = re.compile(r"\([^()]*[*+}][^()]*\)[*+{]")
REPEATS = re.compile(r"(?<!\\)[*+{]")
MATCHING_SECONDS = 5.0


@dataclass(frozen=True)
class Args:
    """How one kind of tensor is quantized."""

    bits: int
    kind: Literal["int", "float"]
    strategy: str
    group_size: int | None
    block: tuple[int, int] | None
    symmetric: bool
    dynamic: bool
    actorder: str | None
    local: bool = False
    """Group scales are computed at run time, relative to a stored global scale."""


@dataclass(frozen=True)
class Group:
    """A config group: what is quantized, and how."""

    name: str
    targets: tuple[str, ...]
    weights: Args | None
    inputs: Args | None
    format: str


@dataclass(frozen=True)
class Quantization:
    """A `quantization_config`, as far as it can be read."""

    method: str
    format: str
    groups: tuple[Group, ...]
    ignore: tuple[str, ...]
    kv_cache: Args | None
    version: str
    has_transforms: bool
    problems: tuple[tuple[str, str, str], ...]
    """Key, value and expected value of each part that cannot be read."""

    @property
    def is_compressed_tensors(self) -> bool:
        """Whether it is in compressed-tensors' format."""
        return self.method == "compressed-tensors"


def read_quantization(said: Any) -> Quantization:
    """Read a `quantization_config`; malformed parts become problems, never exceptions."""
    problems: list[tuple[str, str, str]] = []
    if not isinstance(said, dict):
        problems.append(("quantization_config", _type(said), "an object"))
        said = {}
    groups = said.get("config_groups")
    if groups is not None and not isinstance(groups, dict):
        problems.append(("config_groups", _type(groups), "an object"))
        groups = None
    form = _text(said.get("format"))
    return Quantization(
        method=_text(said.get("quant_method")) or ("compressed-tensors" if groups else ""),
        format=form,
        groups=tuple(_group(str(k), g, form, problems) for k, g in (groups or {}).items()),
        ignore=_texts(said.get("ignore"), "ignore", problems),
        kv_cache=_args(said.get("kv_cache_scheme"), "kv_cache_scheme", problems),
        version=_text(said.get("version")),
        has_transforms=bool(said.get("transform_config")),
        problems=tuple(problems),
    )


def _group(name: str, said: Any, form: str, problems: list[tuple[str, str, str]]) -> Group:
    if not isinstance(said, dict):
        problems.append((f"config_groups.{name}", _type(said), "an object"))
        said = {}
    return Group(
        name,
        _texts(said.get("targets"), f"config_groups.{name}.targets", problems),
        _args(said.get("weights"), f"config_groups.{name}.weights", problems),
        _args(said.get("input_activations"), f"config_groups.{name}.input_activations", problems),
        _text(said.get("format")) or form,
    )


def _args(said: Any, key: str, problems: list[tuple[str, str, str]]) -> Args | None:
    if said is None:
        return None
    if not isinstance(said, dict):
        problems.append((key, _type(said), "an object"))
        return None
    bits, kind, strategy = (said.get(name) for name in ("num_bits", "type", "strategy"))
    size, block = said.get("group_size"), said.get("block_structure")
    strategy = strategy or ("group" if _whole(size) and size else "tensor")
    is_valid = {
        "num_bits": _whole(bits) and 1 <= bits <= 16,
        "type": kind in ("int", "float"),
        "strategy": strategy in STRATEGIES,
        "group_size": size in (None, -1) or (_whole(size) and size > 0),
        "block_structure": block is None or _is_block(block),
    }
    bad = [
        (f"{key}.{name}", repr(said.get(name)), "a valid one")
        for name in is_valid
        if not is_valid[name]
    ]
    if bad or not _whole(bits) or not isinstance(kind, str):
        problems += bad
        return None
    return Args(
        bits,
        "int" if kind == "int" else "float",
        strategy,
        size if size != -1 else None,
        (block[0], block[1]) if block else None,
        said.get("symmetric") is not False,
        said.get("dynamic") is True,
        _text(said.get("actorder")) or None,
        said.get("dynamic") == "local",
    )


def _whole(value: Any) -> TypeGuard[int]:
    return type(value) is int and abs(value) < 1 << 31


def _is_block(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(_whole(n) and n > 0 for n in value)


def _text(value: Any) -> str:
    return value if isinstance(value, str) else ""


def _texts(value: Any, key: str, problems: list[tuple[str, str, str]]) -> tuple[str, ...]:
    if value is None:
        return ()
    if not isinstance(value, list) or not all(isinstance(text, str) for text in value):
        problems.append((key, _type(value), "a list of names"))
        return ()
    return tuple(value)


def _type(value: Any) -> str:
    return f"is a {type(value).__name__}"


# --- modules to groups ---------------------------------------------------------------------------


def pattern_problem(pattern: str) -> str | None:
    """Return what is wrong with a name or an `re:` expression; None if it is valid."""
    if not pattern.startswith("re:"):
        return None
    expression = pattern[3:]
    try:
        re.compile(expression)
    except (re.error, RecursionError, OverflowError) as error:
        return f"is not a regular expression ({error})"
    repeats = max(len(REPEATS.findall(part)) for part in expression.split("|"))
    if NESTED_REPEATS.search(expression) or repeats > MOST_REPEATS:
        return "has repeats that a match may not end for"
    return None


class Resolver:
    """Maps modules to groups as either library does; caches its matches.

    Unusable patterns match nothing, and after `MATCHING_SECONDS` no pattern does: see `is_slow`.
    """

    def __init__(self, quantization: Quantization) -> None:
        self.groups = [group for group in quantization.groups if group.targets]
        self.ignore = quantization.ignore
        self._group_of_target = {t: group for group in self.groups for t in group.targets}
        self._usable = {
            p: pattern_problem(p) is None for p in (*self.ignore, *self._group_of_target)
        }
        self._seconds = 0.0

    @property
    def is_slow(self) -> bool:
        """Whether matching was abandoned for taking too long."""
        return self._seconds > MATCHING_SECONDS

    @functools.cached_property
    def compressed_tensors_order(self) -> list[str]:
        """Targets in compressed-tensors' order: names, then expressions, alphabetically."""
        return sorted(self._group_of_target, key=lambda target: ("re:" in target, target))

    def is_named(self, name: str, patterns: Iterable[str]) -> bool:
        """Whether a module's name matches any of the names or expressions."""
        return any(self.matches(name, pattern) for pattern in patterns)

    def matches(self, name: str, pattern: str) -> bool:
        """Whether a name equals a pattern, or its expression matches the name's beginning."""
        if not pattern.startswith("re:"):
            return pattern == name
        if not self._usable.get(pattern, False) or self.is_slow:
            return False
        begun = time.monotonic()
        matched = re.match(pattern[3:], name) is not None
        self._seconds += time.monotonic() - begun
        return matched

    def by_compressed_tensors(self, name: str) -> Group | None:
        """Return a linear's group as compressed-tensors resolves it."""
        if self.is_named(name, self.ignore) or LINEAR in self.ignore:
            return None
        order = self.compressed_tensors_order
        target = next((t for t in order if self.matches(name, t)), None)
        if target is None and LINEAR in self._group_of_target:
            target = LINEAR
        return None if target is None else self._group_of_target[target]

    def by_vllm(self, name: str, modules: tuple[str, ...]) -> Group | Literal["refused"] | None:
        """Return the group of a linear that vLLM fuses from modules; a half-ignored one is
        "refused"."""
        parent, dot, own = name.rpartition(".")
        shards = modules
        if modules == (name,):  # fused on disk, or not fused
            shards = tuple(f"{parent}{dot}{shard}" for shard in FUSED.get(own, (own,)))
        if not self.is_named(name, self.ignore):
            ignored = [self.is_named(shard, self.ignore) for shard in shards]
            if any(ignored) and not all(ignored):
                return "refused"
            if not all(ignored):
                target = self._vllm_target(name, shards)
                return None if target is None else self._group_of_target[target]
        return None

    def _vllm_target(self, name: str, shards: tuple[str, ...]) -> str | None:
        targets = list(self._group_of_target)
        own = name.rpartition(".")[2]
        kind = VLLM_CLASSES.get(own, "ReplicatedLinear")
        by_name = next((t for t in targets if self.matches(name, t)), None)
        if by_name is not None:
            return by_name
        if len(shards) > 1:
            each = [next((t for t in targets if self.matches(s, t)), None) for s in shards]
            if all(each):
                return each[0]
        return next((t for t in targets if self._is_in_class(kind, t)), None)

    def _is_in_class(self, kind: str, target: str) -> bool:
        if target.startswith("re:"):
            return self.matches(kind, target)
        return target.lower() in kind.lower()

    def names(self, module: str) -> bool:
        """Whether a target names a module explicitly, not by a class or a catch-all."""
        return any(
            self.matches(module, target)
            for target in self._group_of_target
            if not self.matches("anything.else", target)
        )


def fused_names(modules: Iterable[str]) -> Mapping[str, tuple[str, ...]]:
    """Return the modules in each of vLLM's linears, by its name: q/k/v and gate/up are fused."""
    fused: dict[str, tuple[str, ...]] = {}
    for module in modules:
        parent, dot, own = module.rpartition(".")
        whole = next((name for shards, name in FUSED_INTO.items() if own in shards), own)
        name = f"{parent}{dot}{whole}"
        fused[name] = (*fused.get(name, ()), module)
    return fused
