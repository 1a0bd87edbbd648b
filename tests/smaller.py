"""A project with smaller probes: for tests of what the gate does, not of how much it scores.

Products in bfloat16 are slow on a processor without bfloat16 instructions, and one run over the
whole probe takes minutes there. What a model says of a text's beginning does not depend on the
rest, so a golden of these smaller probes is a part of the golden: it is still what was approved.
"""

import dataclasses
import functools
import json
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from quantgate.judging import golden, noise
from quantgate.subject.probe import Probe, Window, embedded_probe, read_probe
from quantgate.subject.task import GENERATE

ROOT = Path(__file__).resolve().parent.parent
# How many tokens are left of most windows, and of every eighth: more than a block of the KV cache
# holds. All documents stay, which the statistics need many of.
SHORT, LONG = 48, 200
QUALITY_WINDOWS = 128


@functools.cache
def smaller(probe: Probe) -> Probe:
    """Return a probe of the beginnings of a probe's windows."""
    windows = [
        _beginning(window, LONG if place % 8 == 7 else SHORT)
        for place, window in enumerate(probe.windows)
    ]
    return dataclasses.replace(probe, windows=tuple(windows))


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
    """Make a project's probes and goldens small."""
    whole = embedded_probe(project, GENERATE)
    for path in (project / "fixtures" / "probes").glob("*.jsonl"):
        _shrink_probe(path)
    shrink_goldens(project / "golden", whole, smaller(whole))


def _shrink_probe(path: Path) -> None:
    """Cut the windows of a model that generates; leave some of a larger one of a model that pools.

    The others are small already, and those of real text are for other tokenizers.
    """
    probe, (header, *lines) = read_probe(path), _lines(path)
    if path.stem.startswith("real"):
        return
    if probe.task == GENERATE:
        cut = smaller(probe).windows
        lines = [{**line, "ids": w.ids, "text": w.text} for line, w in zip(lines, cut, strict=True)]
    elif path.stem.endswith("-quality") and probe.task == "token_classify":
        lines = lines[:QUALITY_WINDOWS]  # the largest; the others decide nothing with fewer
    text = "".join(json.dumps(line) + "\n" for line in (header, *lines))
    path.write_text(text, encoding="utf-8")


def _lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


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
    """Read a golden of `whole` as one of `part`, the beginnings of its windows."""
    found = golden.from_json(path.read_text(encoding="utf-8"), whole, path)
    lengths = {window.document: len(window.ids) for window in part.windows}
    rows = whole.positions < [lengths[document] for document in whole.documents.tolist()]
    measured = dataclasses.replace(
        found.measurement,
        values=found.measurement.values[rows],
        top1=found.measurement.top1[rows],
    )
    key = dataclasses.replace(found.key, probe=part.sha256)
    return dataclasses.replace(found, key=key, measurement=measured)
