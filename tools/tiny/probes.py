"""The probes of the models that generate: held-out documents of the corpus."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from tokenizers import Tokenizer

from quantgate.subject.probe import Window
from tiny import corpus
from tiny.tokenizer import BOS_ID, VOCAB_SIZE

# Documents of each stratum.

# What a model's perplexity is recorded of.
HELDOUT_DOCUMENTS = {stratum: 8 if stratum == "long" else 11 for stratum in corpus.STRATA}
# The first of them are the probes: a larger one for what needs statistical power, and one whose
# documents are cut, for what a fault shows anywhere in.
QUALITY_DOCUMENTS = {stratum: 2 if stratum == "long" else 8 for stratum in corpus.STRATA}
PROBE_DOCUMENTS = {stratum: 2 if stratum == "long" else 6 for stratum in corpus.STRATA}
CUT, LONG_CUT = 96, 512
# For a kernel that takes 0.1 s a token: as many documents, with few tokens of each.
SHORTEST_CUT = 13
# Tokens of a held-out window, with BOS.
WINDOW, LONG_WINDOW = (100, 400), (800, 1000)


def windows_of(tokenizer: Tokenizer, stratum: str, count: int, seed: int) -> Iterator[Window]:
    """The first `count` held-out documents whose length in tokens fits the stratum's window."""
    shortest, longest = LONG_WINDOW if stratum == "long" else WINDOW
    found = index = 0
    while found < count:
        document = corpus.document("heldout", stratum, index, seed)
        ids = tuple(tokenizer.encode(document.text).ids)
        index += 1
        if shortest <= len(ids) <= longest:
            found += 1
            yield Window(document.id, stratum, 1, ids, document.text)


def heldout_windows(tokenizer: Tokenizer, counts: dict[str, int], seed: int) -> list[Window]:
    """The first held-out windows of every stratum."""
    return [
        window
        for stratum, count in counts.items()
        for window in windows_of(tokenizer, stratum, count, seed)
    ]


def cut(tokenizer: Tokenizer, window: Window, longest: int) -> Window:
    """Return the first tokens of a window, `longest` or as many as its text gives again."""
    for length in range(longest, 0, -1):
        ids = window.ids[:length]
        text = tokenizer.decode(list(ids[1:]), skip_special_tokens=False)
        if tuple(tokenizer.encode(text).ids) == ids:
            return replace(window, ids=ids, text=text)
    raise ValueError(f"{window.document}: no beginning of it is tokenized alike.")


def make_probes(tokenizer: Tokenizer, seed: int) -> dict[str, list[Window]]:
    """Return the windows of all probes, by name."""
    short = heldout_windows(tokenizer, PROBE_DOCUMENTS, seed)
    whole = heldout_windows(tokenizer, QUALITY_DOCUMENTS, seed)
    return {
        "tiny": [cut(tokenizer, w, LONG_CUT if w.stratum == "long" else CUT) for w in short],
        "tiny-quality": whole,
        "tiny-short": [cut(tokenizer, window, SHORTEST_CUT) for window in whole],
    }


def probe_lines(name: str, windows: Sequence[Window]) -> Iterator[str]:
    """The probe file: a header, then one JSON object per window."""
    header = {
        "probe": name,
        "vocab_size": VOCAB_SIZE,
        "bos_token_id": BOS_ID,
        "description": "Held-out documents of the synthetic corpus that the tiny Llama learned.",
    }
    return lines_of(header, windows)


def lines_of(header: Mapping[str, Any], windows: Sequence[Window]) -> Iterator[str]:
    """The lines of a probe file with this header."""
    rows = (
        {
            "document": window.document,
            "stratum": window.stratum,
            "score_from": window.score_from,
            "text": window.text,
            "ids": window.ids,
            **({"chat": window.chat} if window.chat else {}),
        }
        for window in windows
    )
    for row in (header, *rows):
        yield json.dumps(row, ensure_ascii=False, separators=(",", ":")) + "\n"
