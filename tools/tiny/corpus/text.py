"""A document of the corpus, and how it is put together from text and names."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

LABELS = ("PERSON", "ORG", "PLACE", "DATE", "PRODUCT")


@dataclass(frozen=True)
class Entity:
    """A named entity: the character span [start, end) of its document, and one of LABELS."""

    start: int
    end: int
    label: str


@dataclass(frozen=True)
class Document:
    """One text; `entities` are in reading order and do not overlap."""

    id: str
    stratum: str
    text: str
    entities: tuple[Entity, ...]


@dataclass(frozen=True)
class Name:
    """A piece of text that is a named entity."""

    text: str
    label: str


Part = str | Name
Parts = list[Part]


def fill(template: str, slots: Mapping[str, Part]) -> Parts:
    """The template with each `{slot}` replaced; a missing slot is a KeyError."""
    pieces = re.split(r"\{(\w+)\}", template)
    return [slots[piece] if odd % 2 else piece for odd, piece in enumerate(pieces)]


def join(lines: Sequence[Parts], separator: str) -> Parts:
    """The lines in one list of parts, with the separator between them."""
    joined: Parts = []
    for number, line in enumerate(lines):
        joined += [separator, *line] if number else line
    return joined


def assemble(name: str, stratum: str, parts: Parts) -> Document:
    """The document that the parts spell, with the spans of its names."""
    text, entities = "", []
    for part in parts:
        if isinstance(part, Name):
            entities.append(Entity(len(text), len(text) + len(part.text), part.label))
            text += part.text
        else:
            text += part
    return Document(name, stratum, text, tuple(entities))
