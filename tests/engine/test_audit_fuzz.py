"""A checkpoint with anything in its files is audited: no traceback, no hang, little memory."""

from __future__ import annotations

import copy
import json
import random
import resource
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from raw_checkpoint import RawCheckpoint, write_safetensors

from quantgate.audit.finding import Finding
from quantgate.audit.rules import audit

ROOT = Path(__file__).resolve().parents[2]
INDEX = "model.safetensors.index.json"
KEPT = ("q_proj.", "k_proj.", "v_proj.", "k_scale", "v_scale", "norm")
CHECKPOINTS = ("w4a16-asym", "w4a16-actorder", "nvfp4", "fp8-kv", "fp8-block", "mxfp4a16")
# Mutations of each file of each checkpoint: 4 files of 6 checkpoints, 2,400 together.
EACH = 100
# It is a part of a checkpoint, and its tokenizer another.
INCOMPLETE = ("missing-beside-base", "vocabulary-differs", "tokenizer-differs")
SLOWEST_SECONDS, LARGEST_BYTES = 20.0, 100_000_000
VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, 1, -1, 3, 10**18, -(2**63), 2**31, 1e308, float("nan"), float("inf")),
    *("", "a" * 10_000, "re:(", "re:(a+)+b", "\x1b[31m", "\ud800", "[bold]", "../../etc/passwd"),
    *([], {}, [[]], [None], [1, 2], {"a": {}}, [0, 10**18], "Linear", "group", "torch.float16"),
)


@pytest.fixture(scope="module", params=CHECKPOINTS)
def small(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One layer's attention of an embedded checkpoint, in two shards with an index."""
    directory = tmp_path_factory.mktemp("fuzz") / str(request.param)
    checkpoint = RawCheckpoint(ROOT / "build" / f"tiny-llama-{request.param}", directory)
    tensors = {
        name: tensor
        for name, tensor in checkpoint.tensors.items()
        if ".layers.0." in name and any(part in name for part in KEPT)
    }
    (directory / "model.safetensors").unlink()
    names = sorted(tensors)
    weight_map: dict[str, str] = {}
    for number, part in enumerate((names[::2], names[1::2])):
        file = f"model-{number}.safetensors"
        write_safetensors(directory / file, {name: tensors[name] for name in part})
        weight_map |= dict.fromkeys(part, file)
    (directory / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    tokenizer = json.loads((directory / "tokenizer.json").read_text())
    tokenizer["model"] = {"type": "BPE", "vocab": {"a": 6, "b": 7}, "merges": [["a", "b"]]}
    (directory / "tokenizer.json").write_text(json.dumps(tokenizer))
    checkpoint.config(num_hidden_layers=1, tie_word_embeddings=True)
    return directory


def nodes(document: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Yield the paths of a JSON document's values."""
    yield path
    items: Any = ()
    if isinstance(document, dict):
        items = document.items()
    elif isinstance(document, list):
        items = enumerate(document[:20])
    for key, value in items:
        yield from nodes(value, (*path, key))


def mutated(text: bytes, chance: random.Random) -> bytes:
    """Return a JSON file with values replaced, removed or renamed, or with its bytes damaged."""
    if chance.random() < 0.3:
        return damaged(text, chance)
    document = json.loads(text)
    for _ in range(chance.randint(1, 3)):
        path = chance.choice(list(nodes(document)))
        if not path:
            return json.dumps(chance.choice(VALUES)).encode()
        parent = document
        for key in path[:-1]:
            parent = parent[key]
        if isinstance(parent, dict) and chance.random() < 0.2:
            del parent[path[-1]]
        elif isinstance(parent, dict) and chance.random() < 0.2:
            parent[f"{path[-1]}\u202e\n"] = copy.deepcopy(parent[path[-1]])
        else:
            parent[path[-1]] = copy.deepcopy(chance.choice(VALUES))
    return json.dumps(document).encode()


def damaged(text: bytes, chance: random.Random) -> bytes:
    kind = chance.randrange(4)
    place = chance.randrange(len(text) + 1)
    if kind == 0:
        return text[:place]
    if kind == 1:
        return text[:place] + chance.randbytes(chance.randint(1, 8)) + text[place + 1 :]
    if kind == 2:
        return b"[" * 100_000 + text
    return text[:place] + text[chance.randrange(len(text) + 1) :]


def with_header(whole: bytes, chance: random.Random) -> bytes:
    """Return a safetensors file with another header, whose length may be any number."""
    length = int.from_bytes(whole[:8], "little")
    header = mutated(whole[8 : 8 + length], chance)
    said = len(header) if chance.random() < 0.8 else chance.choice((0, 1, 10**18, 2**64 - 1))
    return said.to_bytes(8, "little") + header + whole[8 + length :]


def most_memory() -> int:
    """Return the most bytes that this process has held."""
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def audited(directory: Path, base: Path | None) -> tuple[Finding, ...]:
    """Audit within limits of time and memory; every text is fit for a terminal."""
    begun, before = time.monotonic(), most_memory()
    findings = audit(directory, base, deep=base is not None)
    assert time.monotonic() - begun < SLOWEST_SECONDS
    assert most_memory() - before < LARGEST_BYTES
    for finding in findings:
        assert all(text.isprintable() for text in (finding.name, finding.value, finding.expected))
    return findings


@pytest.mark.parametrize("name", ["config.json", INDEX, "model-0.safetensors", "tokenizer.json"])
def test_anything_in_a_file_is_a_finding(small: Path, name: str) -> None:
    path = small / name
    whole = path.read_bytes()
    base = ROOT / "fixtures" / "tiny" / "llama"
    chance = random.Random(f"{small.name} {name}")
    broken = 0
    try:
        for number in range(EACH):
            change = with_header if name.endswith("safetensors") else mutated
            path.write_bytes(change(whole, chance))
            findings = audited(small, base if number % 4 == 0 else None)
            broken += any(f.severity == "error" and f.rule not in INCOMPLETE for f in findings)
    finally:
        path.write_bytes(whole)
    assert broken > EACH / 5
