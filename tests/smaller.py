"""A project with smaller probes: for tests of what the gate does, not of how much it scores.

Products in bfloat16 are slow on a processor without bfloat16 instructions, and one run over the
whole probe takes minutes there. What a model says of a text's beginning does not depend on the
rest, so a golden of these smaller probes is a part of the golden: it is still what was approved.
"""

import dataclasses
import functools
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from quantgate import golden, noise
from quantgate.probe import Probe, Window, embedded_probe
from quantgate.task import GENERATE

ROOT = Path(__file__).resolve().parent.parent
# Every second window: more documents than the statistics need to pass.
EVERY = 2
# How many tokens are left of most, and of every eighth: more than a block of the KV cache holds.
SHORT, LONG = 48, 200
QUALITY_WINDOWS = 128


def smaller(probe: Probe) -> Probe:
    """Return a probe of the beginnings of every second window."""
    lengths = [SHORT if place % 8 else LONG for place in range(len(probe.windows))]
    kept = zip(probe.windows[::EVERY], lengths, strict=False)
    return dataclasses.replace(probe, windows=tuple(_beginning(*each) for each in kept))


def _beginning(window: Window, length: int) -> Window:
    """Return a window's first tokens, and the text that they are the tokens of."""
    offsets = _tokenizer().encode(window.text).offsets
    for end in range(min(length, len(window.ids)), window.score_from, -1):
        text = window.text[: offsets[end - 1][1]]
        if tuple(_tokenizer().encode(text).ids) == window.ids[:end]:
            return dataclasses.replace(window, ids=window.ids[:end], text=text)
    raise AssertionError(f"no beginning of {window.document} is tokenized as in the whole")


@functools.cache
def _tokenizer() -> Any:
    return Tokenizer.from_file(str(ROOT / "fixtures" / "tiny" / "llama" / "tokenizer.json"))


def shrink(project: Path) -> None:
    """Make a project's probe and goldens small, and the larger probes of models that pool."""
    whole = embedded_probe(project, GENERATE)
    part = smaller(whole)
    probes = project / "fixtures" / "probes"
    for path in probes.glob("*-quality.jsonl"):
        _write(path, _lines(path)[1 : QUALITY_WINDOWS + 1])
    windows = zip(_lines(probes / "tiny.jsonl")[1::EVERY], part.windows, strict=True)
    _write(probes / "tiny.jsonl", [{**line, "ids": w.ids, "text": w.text} for line, w in windows])
    shrink_goldens(project / "golden", whole, part)


def _lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def _write(path: Path, windows: Iterable[dict[str, Any]]) -> None:
    """Give a probe file these windows."""
    lines = [_lines(path)[0], *windows]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")


def shrink_goldens(folder: Path, whole: Probe, part: Probe) -> None:
    """Make goldens of `whole`, and the noise floors beside them, those of `part`."""
    for path in folder.rglob("*.json"):
        text = path.read_text(encoding="utf-8")
        if json.loads(text)["key"]["probe"] != whole.sha256:
            continue  # of another task's probe, which is small already
        if path.name.startswith("noise-"):
            floor = noise.from_json(text, path)
            key = dataclasses.replace(floor.key, probe=part.sha256)
            path.write_text(noise.to_json(dataclasses.replace(floor, key=key)))
        else:
            path.write_text(golden.to_json(golden_of_part(path, whole, part), part))


def golden_of_part(path: Path, whole: Probe, part: Probe) -> golden.Golden:
    """Read a golden of `whole` as one of `part`, the beginnings of some of its windows."""
    found = golden.from_json(path.read_text(encoding="utf-8"), whole, path)
    lengths = {window.document: len(window.ids) for window in part.windows}
    ends = np.array([lengths.get(document, 0) for document in whole.documents.tolist()])
    rows = whole.positions < ends
    measured = dataclasses.replace(
        found.measurement,
        values=found.measurement.values[rows],
        top1=found.measurement.top1[rows],
    )
    key = dataclasses.replace(found.key, probe=part.sha256)
    return dataclasses.replace(found, key=key, measurement=measured)
