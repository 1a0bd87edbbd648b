"""Rules about files: they are readable, complete, and in agreement with the index."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

from quantgate.audit.finding import Place, Rule
from quantgate.audit.inventory import INDEX, Inventory
from quantgate.subject.files import PICKLED


def _unreadable(inventory: Inventory) -> Iterator[Place]:
    directory = inventory.directory
    if not directory.is_dir():
        yield Place(str(directory), "is not a directory", "a checkpoint's directory")
        return
    if "config.json" not in inventory.documents and "config.json" not in inventory.unreadable:
        yield Place("config.json", "is missing", "a checkpoint's config", "config.json")
    for name, reason in inventory.unreadable.items():
        yield Place(name, reason, "a JSON file", name)
    for name, said in inventory.documents.items():
        if not isinstance(said, dict):
            yield Place(name, f"holds a {type(said).__name__}", "an object", name)
    if not inventory.shards:
        pickled = any(path for pattern in PICKLED for path in directory.glob(pattern))
        value = "there are only pickled weights" if pickled else "there are no weights"
        yield Place(str(directory.name), value, "*.safetensors")
    for key, value, expected in inventory.quantization.problems if inventory.quantization else ():
        yield Place(key, value, expected, "config.json")


def _base_unreadable(inventory: Inventory) -> Iterator[Place]:
    base = inventory.base
    if base is None:
        return
    for place in _unreadable(base):
        yield place._replace(name=f"base: {place.name}")
    for shard in base.shards:
        for problem in shard.problems:
            yield Place(f"base: {problem.name}", problem.value, problem.expected, shard.path.name)


def _headers(inventory: Inventory) -> Iterator[Place]:
    for shard in inventory.shards:
        for problem in shard.problems:
            if problem.expected:
                yield Place(*problem, file=shard.path.name)


def _gaps(inventory: Inventory) -> Iterator[Place]:
    for shard in inventory.shards:
        for name, value, expected in shard.problems:
            if not expected:
                yield Place(name, value, "tensors one after another", shard.path.name)


def _twice(inventory: Inventory) -> Iterator[Place]:
    files = Counter(name for shard in inventory.shards for name in shard.entries)
    for shard in inventory.shards:
        for name in shard.twice:
            yield Place(name, "is twice in one header", "once", shard.path.name)
    for name, count in files.items():
        if count > 1:
            holders = [shard.path.name for shard in inventory.shards if name in shard.entries]
            yield Place(name, f"is in {', '.join(holders)}", "one file", holders[-1])


def _index(inventory: Inventory) -> Iterator[Place]:
    weight_map = _weight_map(inventory)
    if weight_map is None:
        if INDEX in inventory.documents:
            yield Place("weight_map", "is not an object of file names", "one", INDEX)
        elif len(inventory.shards) > 1:
            yield Place(INDEX, f"is missing beside {len(inventory.shards)} shards", "an index")
        return
    entries = {shard.path.name: shard.entries for shard in inventory.shards}
    for file in sorted(set(weight_map.values()) - entries.keys()):
        yield Place(file, "is named by the index and missing", "the file", INDEX)
    for name, file in weight_map.items():
        if file in entries and name not in entries[file]:
            yield Place(name, f"is not in {file}, as the index says", "the tensor", INDEX)
    for file, held in entries.items():
        for name in held:
            if file in weight_map.values() and name not in weight_map:
                yield Place(name, f"is in {file} and not in the index", "an entry for it", INDEX)


def _orphans(inventory: Inventory) -> Iterator[Place]:
    weight_map = _weight_map(inventory)
    if not weight_map:
        return
    for shard in inventory.shards:
        if shard.path.name not in weight_map.values():
            yield Place(shard.path.name, "is named by no entry of the index", "no other file")


def _total_size(inventory: Inventory) -> Iterator[Place]:
    metadata = inventory.document(INDEX).get("metadata")
    said = metadata.get("total_size") if isinstance(metadata, dict) else None
    actual = sum(entry.size for entry in inventory.tensors.values())
    if type(said) is int and said != actual and inventory.shards:
        yield Place("metadata.total_size", str(said), f"{actual}, the sum of tensors", INDEX)


def _weight_map(inventory: Inventory) -> dict[str, str] | None:
    said: Any = inventory.document(INDEX).get("weight_map")
    if not isinstance(said, dict) or not all(isinstance(file, str) for file in said.values()):
        return None
    return said


UNREADABLE = Rule(
    "unreadable",
    "error",
    "Nothing can be said of a checkpoint whose config or weights cannot be read.",
    "every loader refuses it, some with a traceback",
    _unreadable,
)
RULES = (
    UNREADABLE,
    Rule(
        "base-unreadable",
        "error",
        "A base that cannot be read is compared with nothing.",
        "a wrong path given as base",
        _base_unreadable,
        needs="base",
    ),
    Rule(
        "shard-header",
        "error",
        "A truncated file or a header that does not fit its file loses tensors.",
        "downloads that were cut off",
        _headers,
    ),
    Rule(
        "shard-gap",
        "error",
        "Tensors that overlap, or bytes that are no tensor's, mean that offsets are wrong.",
        "the safetensors format forbids both",
        _gaps,
    ),
    Rule(
        "tensor-twice",
        "error",
        "Of two tensors of one name loaders take whichever comes last, which may be stale.",
        "a shard of an older export left in the directory",
        _twice,
    ),
    Rule(
        "index",
        "error",
        "What the index leaves out is not loaded, and what it names in vain is missing.",
        "vllm#57108: missing block scales load silently; sglang#37679: 13,440 tensors dropped",
        _index,
    ),
    Rule(
        "shard-orphan",
        "error",
        "A file that the index does not name is loaded by some loaders and not by others.",
        "a shard of an older export left in the directory",
        _orphans,
    ),
    Rule(
        "total-size",
        "warning",
        "The index was written for other tensors than these.",
        "checkpoints repacked by hand",
        _total_size,
    ),
)
