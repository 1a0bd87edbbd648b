"""The probes of real text, in the token ids of the real models' own tokenizers."""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from quantgate.subject.probe import Window, encode
from quantgate.subject.task import EMBED, GENERATE, Task
from real.models import base
from real.texts import STRATA, Text, texts, titles
from tiny.probes import lines_of

# Tokens of a window, and how many windows of a stratum: in the probe and in the larger one.
CUT, WINDOWS = 96, 4
QUALITY_CUT, QUALITY_WINDOWS = 128, 7
# Texts from here on are in no probe: what is calibrated on them has seen none of it.
FIRST_UNUSED = 10
# Documents as long as a context of 8,192 tokens allows, and half as long.
LONG_CUTS = (4352, 8128)
# A tokenizer makes at least one token of so many characters of any of these texts.
CHARACTERS = 12
PAIRS, QUALITY_PAIRS = 24, 100


def make_probes() -> dict[str, str]:
    """Return the content of each probe file, by its name."""
    from transformers import AutoTokenizer

    generates, embeds = (AutoTokenizer.from_pretrained(base(n)) for n in ("smollm2", "minilm"))
    short = [stratum for stratum in STRATA if stratum != "long"]
    probe = list(_windows(generates, short, WINDOWS, CUT)) + list(_long_windows(generates))
    quality = list(_windows(generates, short, QUALITY_WINDOWS, QUALITY_CUT))
    return {
        "real": _lines("real", generates, probe),
        "real-quality": _lines("real-quality", generates, quality),
        "real-retrieval": _lines("real-retrieval", embeds, list(_pairs(embeds, PAIRS)), EMBED),
        "real-retrieval-quality": _lines(
            "real-retrieval-quality", embeds, list(_pairs(embeds, QUALITY_PAIRS)), EMBED
        ),
    }


def _windows(tokenizer: Any, strata: Sequence[str], count: int, cut: int) -> Iterator[Window]:
    for stratum in strata:
        found = (window_of(tokenizer, text, stratum, cut) for text in texts(stratum))
        yield from itertools.islice(filter(None, found), count)


def _long_windows(tokenizer: Any) -> Iterator[Window]:
    for text, cut in zip(texts("long"), LONG_CUTS, strict=True):
        window = window_of(tokenizer, text, "long", cut)
        assert window is not None
        assert len(window.ids) > cut - 64, f"{text.document} is too short"
        yield window


def window_of(tokenizer: Any, text: Text, stratum: str, cut: int) -> Window | None:
    """Return a text's beginning of at most `cut` tokens that its own text gives again.

    None for a text of less than half as many tokens, unless it is a chat, which stays whole.
    """
    whole = Window(text.document, stratum, 1, (), text.text, chat=text.chat)
    if text.chat:
        return replace(whole, ids=encode(tokenizer, whole))
    ids = encode(tokenizer, replace(whole, text=text.text[: cut * CHARACTERS]))
    for length in range(min(cut, len(ids)), cut // 2, -1):
        start = tokenizer.decode(list(ids[:length]), skip_special_tokens=True)
        cut_short = replace(whole, text=start)
        if encode(tokenizer, cut_short) == ids[:length]:
            return replace(cut_short, ids=ids[:length])
    return None


def _pairs(tokenizer: Any, count: int) -> Iterator[Window]:
    for query, passage in itertools.islice(titles(), count):
        for stratum, text in (("query", query), ("document", passage)):
            window = Window(query.document, stratum, 0, (), text.text[:400])
            yield replace(window, ids=encode(tokenizer, window))


def _lines(name: str, tokenizer: Any, windows: Sequence[Window], task: Task = GENERATE) -> str:
    header = {
        "probe": name,
        "task": task,
        "vocab_size": len(tokenizer),
        "description": "Real text: fixtures/probes/SOURCES.md says where it is from.",
    }
    return "".join(lines_of(header, windows))
