"""The text that the tiny model is trained and probed on: a seeded grammar with six strata.

Every document is drawn from its own generator, seeded by (seed, split, stratum, index), so any
one document can be made again without the others and the two splits never share a stream. Names
are spelled from syllables and numbers are free, so there is far more text than a model could
memorise, while the sentences, the agreement rules and the back-references can be learned.
"""

import random
from collections.abc import Callable, Iterator, Mapping

from tiny.corpus.chronicles import long
from tiny.corpus.dialogues import chat
from tiny.corpus.functions import code
from tiny.corpus.problems import arithmetic
from tiny.corpus.stories import prose
from tiny.corpus.text import LABELS, Document, Parts, assemble
from tiny.corpus.translations import multilingual

__all__ = ["LABELS", "STRATA", "Document", "document", "documents"]

SPLITS = ("train", "heldout")
WRITERS: Mapping[str, Callable[[random.Random], Parts]] = {
    "prose": prose,
    "arithmetic": arithmetic,
    "code": code,
    "chat": chat,
    "multilingual": multilingual,
    "long": long,
}
STRATA = tuple(WRITERS)


def document(split: str, stratum: str, index: int, seed: int = 0) -> Document:
    """Document number `index` of a split ("train" or "heldout") and stratum.

    The same arguments give the same document on every platform. An unknown split or stratum is a
    ValueError.
    """
    if split not in SPLITS or stratum not in WRITERS:
        raise ValueError(f"no documents of split {split!r} and stratum {stratum!r}")
    rng = random.Random(f"{seed}/{split}/{stratum}/{index}")
    return assemble(f"{split}-{stratum}-{index:05d}", stratum, WRITERS[stratum](rng))


def documents(split: str, stratum: str, count: int, seed: int = 0) -> Iterator[Document]:
    """The first `count` documents of a split and stratum."""
    return (document(split, stratum, index, seed) for index in range(count))
