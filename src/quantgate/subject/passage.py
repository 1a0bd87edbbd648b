"""Tokens in their text, as messages and reports show them."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

LONGEST_TEXT = 200


@dataclass(frozen=True)
class Passage:
    """A scored token and the text around it."""

    before: str
    token: str
    after: str

    def __str__(self) -> str:
        if not self.before and not self.after:
            return self.token
        return f"…{self.before}»{self.token}«{self.after}…"


@functools.lru_cache(maxsize=2)
def tokenizer_of(directory: Path) -> Any:
    """Return a checkpoint's tokenizer; what transformers raises where it has none."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(directory, trust_remote_code=False)


def in_one_line(text: str) -> str:
    """Escape unprintable characters, such as line ends, and cut overlong text."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text[:LONGEST_TEXT])
