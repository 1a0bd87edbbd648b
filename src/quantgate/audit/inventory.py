"""Everything that rules examine in a checkpoint: headers, text files and configs."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quantgate.audit.decode import POSITIVE, Spread, is_float, spread_of
from quantgate.audit.headers import Entry, Shard, read_json, read_shard
from quantgate.audit.quantization import Group, Quantization, Resolver, read_quantization

INDEX = "model.safetensors.index.json"
# Text files that define how a checkpoint is used.
DOCUMENTS = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "hf_quant_config.json",
    INDEX,
)
# Parts that only a quantized module has.
QUANTIZED_PARTS = frozenset(
    (
        *("weight_packed", "weight_scale", "weight_scale_inv", "weight_global_scale"),
        *("weight_scale_2", "qweight", "weight_shape", "weight_zero_point"),
    )
)
# Parts that hold scales.
SCALE_PARTS = frozenset(
    (
        *("weight_scale", "weight_scale_inv", "weight_scale_2", "weight_global_scale", "scales"),
        *("input_scale", "input_global_scale", "output_scale", "k_scale", "v_scale", "q_scale"),
    )
)
LAYER = re.compile(r"(?:^|(?<=\.))(?:layers?|h|blocks?)\.(\d{1,6})\.")
# Two-dimensional weights that do not belong to linears.
NOT_LINEAR = re.compile(r"embed|wte$|wpe$|norm|shared$|rotary|position|token_type|conv", re.I)
# In transformers 5 a router is a module of its own, not a linear, whatever its shape.
ROUTER = re.compile(r"(?:^|\.)(?:router|mlp\.gate|block_sparse_moe\.gate|gate\.wg)(?:\.|$)")


@dataclass(frozen=True, eq=False)
class Inventory:
    """The content of a checkpoint's directory; none of it is trusted."""

    directory: Path
    shards: tuple[Shard, ...]
    documents: Mapping[str, Any]
    """The readable JSON files, by name."""
    unreadable: Mapping[str, str]
    """The unreadable files, with the reason."""
    base: Inventory | None = None
    progress: Callable[[str, int, int], None] = lambda _name, _done, _all: None
    """Called before each weight that is compared with the base's."""

    @functools.cached_property
    def tensors(self) -> dict[str, Entry]:
        """Every tensor; if several shards hold one, the last shard's, which loaders use.

        Files missing from the index are not loaded.
        """
        weight_map = self.document(INDEX).get("weight_map")
        named = weight_map.values() if isinstance(weight_map, dict) else ()
        served = [shard for shard in self.shards if shard.path.name in named]
        tensors: dict[str, Entry] = {}
        for shard in served or self.shards:
            tensors.update(shard.entries)
        return tensors

    @functools.cached_property
    def modules(self) -> dict[str, dict[str, Entry]]:
        """Modules' own tensors, named without the module."""
        modules: dict[str, dict[str, Entry]] = {}
        for name, entry in self.tensors.items():
            module, _, part = name.rpartition(".")
            modules.setdefault(module, {})[part] = entry
        return modules

    @functools.cached_property
    def config(self) -> dict[str, Any]:
        """`config.json`, or {}."""
        return self.document("config.json")

    @functools.cached_property
    def text_config(self) -> dict[str, Any]:
        """The part of config.json that describes the language model."""
        for key in ("text_config", "llm_config", "language_config"):
            if isinstance(inner := self.config.get(key), dict):
                return inner
        return self.config

    @functools.cached_property
    def quantization(self) -> Quantization | None:
        """The quantization section of config.json; None if there is none."""
        said = self.config.get("quantization_config", self.text_config.get("quantization_config"))
        return None if said is None else read_quantization(said)

    @functools.cached_property
    def is_rotated(self) -> bool:
        """Whether weights were rotated (SpinQuant, QuIP), so that none is the base's."""
        return self.quantization is not None and self.quantization.has_transforms

    @functools.cached_property
    def resolver(self) -> Resolver | None:
        """Maps modules to groups; None if the method is not compressed-tensors."""
        quantization = self.quantization
        if quantization is None or not quantization.is_compressed_tensors:
            return None
        return Resolver(quantization)

    @functools.cached_property
    def quantized(self) -> list[str]:
        """Modules that have a quantized weight on disk, in order."""
        return [
            name
            for name, parts in self.modules.items()
            if QUANTIZED_PARTS & parts.keys()
            or ("weight" in parts and parts["weight"].dtype.startswith(("F8_", "I8")))
        ]

    @functools.cached_property
    def groups(self) -> dict[str, Group]:
        """The group of each quantized module to which compressed-tensors assigns one."""
        if self.resolver is None:
            return {}
        groups = {name: self.resolver.by_compressed_tensors(name) for name in self.quantized}
        return {name: group for name, group in groups.items() if group is not None}

    @functools.cached_property
    def linears(self) -> list[str]:
        """Modules that are linears, quantized or not, judging by names and shapes."""
        quantized = set(self.quantized)
        return [
            name
            for name, parts in self.modules.items()
            if name in quantized or _is_linear(name, parts)
        ]

    @functools.cached_property
    def spreads(self) -> dict[str, Spread]:
        """Statistics of each scale tensor with a plausible dtype; reads all of them."""
        return {
            name: spread_of(entry, dtype)
            for name, entry in self.tensors.items()
            if name.rpartition(".")[2] in SCALE_PARTS
            and entry.count
            and (dtype := "F8_E8M0" if entry.dtype == "U8" else entry.dtype) in POSITIVE
        }

    def document(self, name: str) -> dict[str, Any]:
        """Return a JSON file's object, or {}."""
        said = self.documents.get(name)
        return said if isinstance(said, dict) else {}

    def size(self, key: str) -> int | None:
        """Return a positive integer from the language model's config, or None."""
        value = self.text_config.get(key)
        return value if type(value) is int and 0 < value < 1 << 31 else None


def read_inventory(directory: Path, base: Path | None = None) -> Inventory:
    """Read a checkpoint's headers and text files; unreadable ones are recorded, not raised.

    No weights are read yet.
    """
    documents: dict[str, Any] = {}
    unreadable: dict[str, str] = {}
    for name in DOCUMENTS:
        path = directory / name
        if not (path.exists() or path.is_symlink()):
            continue
        try:
            documents[name] = read_json(path)
        except ValueError as error:
            unreadable[name] = str(error)
    paths = sorted(directory.glob("*.safetensors"))
    # A second copy of the weights, in the layout of Mistral's own library.
    others = [path for path in paths if not path.name.startswith("consolidated")]
    shards = tuple(read_shard(path) for path in others or paths)
    other = None if base is None else read_inventory(base)
    return Inventory(directory, shards, documents, unreadable, other)


def _is_linear(name: str, parts: Mapping[str, Entry]) -> bool:
    weight = parts.get("weight")
    return (
        weight is not None
        and len(weight.shape) == 2
        and is_float(weight.dtype)
        and not NOT_LINEAR.search(name)
        and not ROUTER.search(name)
    )
