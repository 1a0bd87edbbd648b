"""Rules about files that could run code or link out of the directory, and about the recipe."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from quantgate.audit.finding import Place, Rule
from quantgate.audit.inventory import Inventory
from quantgate.subject.files import PICKLED
from quantgate.subject.scheme import scheme_name

LONGEST_RECIPE = 1_000_000
SCHEME = re.compile(r"^\s*(?:-\s*)?scheme:\s*['\"]?([A-Za-z0-9_]+)['\"]?\s*$", re.M)


def _pickles(inventory: Inventory) -> Iterator[Place]:
    for pattern in PICKLED:
        for path in sorted(inventory.directory.glob(pattern)):
            yield Place(path.name, "is a pickle", "safetensors alone", path.name)


def _remote_code(inventory: Inventory) -> Iterator[Place]:
    for name in ("config.json", "tokenizer_config.json"):
        said = inventory.document(name).get("auto_map")
        if said:
            yield Place("auto_map", str(said), "no code of its own", name)
    for path in sorted(inventory.directory.glob("*.py"))[:10]:
        yield Place(path.name, "is a Python file", "no code of its own", path.name)


def _symlinks(inventory: Inventory) -> Iterator[Place]:
    """Links out of the directory, except a hub cache's to the blobs beside its snapshots."""
    directory = inventory.directory
    if not directory.is_dir():
        return
    root = directory.resolve()
    blobs = root.parent.parent / "blobs" if root.parent.name == "snapshots" else root
    for path in sorted(directory.iterdir()):
        if path.is_symlink() and not _within(path, root, blobs):
            yield Place(path.name, "leads out of the directory", "a file in it", path.name)


def _within(path: Path, *roots: Path) -> bool:
    try:
        target = path.resolve()
    except (OSError, RuntimeError):  # a loop of links
        return False
    return any(target.is_relative_to(root) for root in roots)


def _recipe(inventory: Inventory) -> Iterator[Place]:
    """llm-compressor writes the recipe beside the checkpoint: its scheme must match the config."""
    text = recipe_of(inventory)
    schemes = set(SCHEME.findall(text))
    if inventory.resolver is None or len(schemes) != 1:
        return
    (said,) = schemes
    try:
        actual = scheme_name(inventory.config.get("quantization_config"))
    except (AttributeError, TypeError):
        return  # `unreadable` reports it
    if said.replace("_ASYM", "") not in actual and actual.partition("+")[0] not in said:
        yield Place("quantization_config", actual, f"{said}, as recipe.yaml", "config.json")


def recipe_of(inventory: Inventory) -> str:
    """Return the text of llm-compressor's recipe, or ""."""
    path = inventory.directory / "recipe.yaml"
    if not path.is_file() or path.stat().st_size > LONGEST_RECIPE:
        return ""
    return path.read_text(encoding="utf-8", errors="replace")


RULES = (
    Rule(
        "pickle",
        "warning",
        "A pickle runs whatever code its writer put in it, wherever it is loaded.",
        "hub scanners find them every week",
        _pickles,
    ),
    Rule(
        "remote-code",
        "warning",
        "The checkpoint brings code that trust_remote_code would run.",
        "custom architectures; the gate never runs it",
        _remote_code,
    ),
    Rule(
        "symlink-outside",
        "error",
        "A link that leads elsewhere reads or serves what is not the checkpoint's.",
        "archives that were unpacked without looking",
        _symlinks,
    ),
    Rule(
        "recipe-differs",
        "error",
        "The config says another scheme than the recipe that made the checkpoint.",
        "Model-Optimizer#868: counts by precision beside the recipe's",
        _recipe,
    ),
)
