"""Measure what quantization costs, and stop as soon as the answer is clear.

For text beyond the probe, on a machine billed by the minute. The bounds hold after all blocks at
once (`stats.confidence_sequence`), so looking at them after each block is valid.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from quantgate.errors import BadInput
from quantgate.judging.stats import confidence_sequence
from quantgate.judging.verdict import Outcome, one_sided
from quantgate.measuring import session
from quantgate.measuring.case import Case
from quantgate.measuring.engine import running_engine
from quantgate.subject.probe import Probe, Window

BLOCK = 8
CHARACTERS = 2000
_ORDER = 0  # the seed for the order of the documents


@dataclass(frozen=True)
class Progress:
    """The state after some documents: bounds on mean ΔNLL, in nat per token."""

    documents: int
    tokens: int
    mean: float
    lower: float
    upper: float
    outcome: Outcome


def probe_of_text(texts: Iterable[str], directory: Path) -> Probe:
    """Return a probe of texts in a checkpoint's tokens; each window is its own document.

    A window ends at the first line end after `CHARACTERS` characters; longer lines are cut. All
    tokens of a window except its first are scored.
    """
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(directory, trust_remote_code=False)
    windows: list[Window] = []
    for text in texts:
        for part in _pieces(text):
            ids = tuple(tokenizer(part)["input_ids"])
            if len(ids) > 1:
                windows.append(Window(f"text-{len(windows):05}", "text", 1, ids, part))
    if not windows:
        raise BadInput(
            "the text has fewer than two tokens, so there is nothing to score; give a longer text."
        )
    return Probe("text", len(tokenizer), tuple(windows), tokenizer=directory)


def _pieces(text: str) -> Iterator[str]:
    held = ""
    for line in text.splitlines(keepends=True):
        for start in range(0, len(line), CHARACTERS):
            held += line[start : start + CHARACTERS]
            if len(held) >= CHARACTERS:
                yield held
                held = ""
    if held:
        yield held


def quality_until_clear(case: Case, probe: Probe, margin: float) -> Iterator[Progress]:
    """Score a checkpoint block by block and yield the state after each; the last one decides.

    The base scores everything first, and its scores are cached on disk, so the two models need not
    fit in memory together.
    """
    checkpoint = case.checkpoint
    if case.base is None:
        raise BadInput(f"{checkpoint.id}: no base is named; give --base, or base in its file.")
    expected = case.base.engine
    documents = list(dict.fromkeys(probe.documents.tolist()))
    order = np.random.default_rng(_ORDER).permutation(len(documents))
    sums: list[float] = []
    sizes: list[int] = []
    with running_engine(checkpoint.directory, settings=checkpoint.engine, dtype=case.dtype) as llm:
        provenance = session.provenance_of(llm, case.dtype)
        for start in range(0, len(order), BLOCK):
            names = [documents[i] for i in order[start : start + BLOCK]]
            part = dataclasses.replace(
                probe, windows=tuple(w for w in probe.windows if w.document in names)
            )
            found = session.serve(llm, part, provenance)
            for name in names:
                delta = _nll_difference(
                    expected.logprob[probe.documents == name],
                    found.logprob[part.documents == name],
                )
                sums.append(float(delta.sum()))
                sizes.append(len(delta))
            progress = _known(np.array(sums), np.array(sizes), margin)
            yield progress
            if progress.outcome != "inconclusive":
                return


def _nll_difference(
    base: NDArray[np.floating[Any]], ours: NDArray[np.floating[Any]]
) -> NDArray[np.float64]:
    return base.astype(np.float64) - ours


def _known(sums: NDArray[np.float64], sizes: NDArray[np.int64], margin: float) -> Progress:
    tokens = int(sizes.sum())
    mean = float(sums.sum()) / tokens
    if not np.isfinite(mean):
        return Progress(len(sums), tokens, mean, mean, mean, "fail")
    lower, upper = confidence_sequence(sums / sizes, sizes)
    bounds = float(lower[-1]), float(upper[-1])
    return Progress(len(sums), tokens, mean, *bounds, one_sided(*bounds, margin))
