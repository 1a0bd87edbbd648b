"""What the models with heads learn from: documents of the corpus, with a label on their tokens."""

import random
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from tiny import corpus
from tiny.corpus.stories import TOPICS

IGNORED = -100
NER_LABELS = ("O", *corpus.LABELS)
STEP_LABELS = ("wrong", "right")
STEP_TAG = "Ċ"  # the line end, as this tokenizer spells it
# Tokens of an example at most.
LONGEST = 256


@dataclass(frozen=True)
class Example:
    """Token ids and, for each of them, its label, or IGNORED; the text that they stand for."""

    ids: list[int]
    labels: list[int]
    text: str


def entity_examples(tokenizer: Any, split: str, count: int) -> Iterator[Example]:
    """Stories, with the entity that each token is in, or "O".

    Without their titles: transformers gives every Qwen2 a splitting of its own, by which an empty
    line is another token than in the other models.
    """
    for document in corpus.documents(split, "prose", count):
        start = document.text.index("\n\n") + 2
        text = document.text[start:]
        encoded = tokenizer(text, return_offsets_mapping=True)
        labels = [
            entity_of(document, begin + start, end + start) if begin < end else IGNORED
            for begin, end in encoded["offset_mapping"]  # nothing: what the tokenizer added
        ]
        yield Example(encoded["input_ids"][:LONGEST], labels[:LONGEST], text)


def entity_of(document: corpus.Document, start: int, end: int) -> int:
    """Return the label of the entity that characters [start, end) are in; no entity is 0."""
    return next(
        (
            NER_LABELS.index(entity.label)
            for entity in document.entities
            if entity.start < end and start < entity.end
        ),
        0,
    )


def step_examples(tokenizer: Any, split: str, count: int) -> Iterator[Example]:
    """Solutions in steps, some wrong; a label on each step's line end, as TRL's trainer has it."""
    for index in range(count):
        text, labels = tidied_place(random.Random(f"{split}/steps/{index}"))
        ids = tokenizer(text)["input_ids"]
        ends = iter(labels)
        tag = tokenizer.convert_tokens_to_ids(STEP_TAG)
        yield Example(ids, [next(ends) if token == tag else IGNORED for token in ids], text)


def tidied_place(rng: random.Random) -> tuple[str, list[int]]:
    """Return a text of a few steps, and for each of them whether it is right (1) or wrong (0).

    A step is right where what it puts back belongs to the place.
    """
    place = rng.choice(TOPICS)
    elsewhere = [topic for topic in TOPICS if topic is not place]
    lines, labels = [], []
    for number in range(1, rng.randint(4, 8) + 1):
        right = rng.random() < 0.6
        thing = rng.choice((place if right else rng.choice(elsewhere)).nouns)
        lines.append(f"Step {number}: put back the {thing}.\n")
        labels.append(int(right))
    return f"{place.title} is to be tidied. " + "".join(lines), labels


def graded_examples(tokenizer: Any, split: str, count: int) -> Iterator[Example]:
    """Short stories, the words of 0 to 4 of their sentences out of order: the grade is minus that.

    The label is on the last token, where a sequence model's reward is.
    """
    for document in corpus.documents(split, "prose", count):
        rng = random.Random(f"{split}/graded/{document.id}")
        sentences = re.findall(r"[A-Z][^.]*\.(?=\s)", document.text.partition("\n\n")[2])[:4]
        damaged = rng.sample(range(len(sentences)), rng.randint(0, len(sentences)))
        for index in damaged:
            words = sentences[index].removesuffix(".").split()
            sentences[index] = " ".join(rng.sample(words, len(words))) + "."
        text = " ".join(sentences)
        ids = tokenizer(text)["input_ids"]
        yield Example(ids, [IGNORED] * (len(ids) - 1) + [-len(damaged)], text)


def retrieval_examples(tokenizer: Any, split: str, count: int) -> Iterator[Example]:
    """A question about two names, then the story that they are from, in turns."""
    for document in corpus.documents(split, "prose", count):
        story = " ".join(document.text.partition("\n\n")[2].split())
        story = re.findall(r".{60,160}?\.(?=\s|$)", story)[0]
        names = [document.text[e.start : e.end] for e in document.entities]
        here = [name for name in dict.fromkeys(names) if name in story][:2]
        for text in (f"What about {' and '.join(here)}?", story):
            ids = tokenizer(text)["input_ids"]
            yield Example(ids, [IGNORED] * len(ids), text)
