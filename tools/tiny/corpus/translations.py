"""Paragraphs in other languages, and sentences beside their translations."""

import random
from dataclasses import dataclass

from tiny.corpus.languages import (
    ENGLISH,
    FOREIGN,
    FOREIGN_WEIGHTS,
    GERMAN,
    GREEK,
    JAPANESE,
    Language,
)
from tiny.corpus.names import Person, person, place
from tiny.corpus.text import Name, Part, Parts, fill, join


@dataclass(frozen=True)
class Statement:
    """What a sentence says, before any language: indices into the concept lists."""

    kind: str
    noun: int
    adjective: int
    predicate: int
    verb: int
    time: int
    by_name: bool


def statement(rng: random.Random) -> Statement:
    """A random thing to say about a place or a person."""
    adjective, predicate = rng.sample(range(len(ENGLISH.adjectives)), 2)
    return Statement(
        rng.choice(("seems", "sees", "sees")),
        rng.randrange(len(ENGLISH.nouns)),
        adjective,
        predicate,
        rng.randrange(len(ENGLISH.verbs)),
        rng.randrange(len(ENGLISH.times)),
        rng.random() < 0.4,
    )


def noun_phrase(language: Language, said: Statement, is_object: bool) -> str:
    """The article, adjective and noun of a statement, agreeing in gender and case."""
    gender, noun = language.nouns[said.noun]
    which = language.genders.index(gender)
    article = (language.object if is_object else language.subject)[which]
    adjective = language.adjectives[said.adjective][which]
    if is_object and gender == "m" and language is GERMAN:
        adjective += "n"
    if is_object and gender == "m" and language is GREEK:
        # The masculine accusative of these words drops the final sigma.
        adjective, noun = adjective.removesuffix("ς"), noun.removesuffix("ς")
    return language.phrase.format(art=article, adj=adjective, noun=noun)


def utter(language: Language, said: Statement, who: Person) -> Parts:
    """The statement in the language, about `who` where it needs a person."""
    gender = language.nouns[said.noun][0]
    name = Name(f"{who.given} {who.family}", "PERSON")
    slots: dict[str, Part] = {
        "np": noun_phrase(language, said, said.kind == "sees"),
        "pred": language.predicates[said.predicate][language.genders.index(gender)],
        "time": language.times[said.time],
        "verb": language.verbs[said.verb],
        "who": name if said.by_name else language.pronouns[who.feminine],
    }
    return fill(language.seems if said.kind == "seems" else language.sees, slots)


def arrival(
    language: Language, who: Person, where: str, day: int, month_index: int, year: int
) -> Parts:
    """The sentence that says when somebody came to a place; months count from 0."""
    when = language.date.format(day=day, month=language.months[month_index], year=year)
    slots: dict[str, Part] = {
        "D": Name(when, "DATE"),
        "P": Name(f"{who.given} {who.family}", "PERSON"),
        "L": Name(where, "PLACE"),
    }
    return fill(language.arrives[who.feminine], slots)


def foreign_language(rng: random.Random) -> Language:
    """A language other than English; the ones with long byte sequences are rarer."""
    return rng.choices(FOREIGN, FOREIGN_WEIGHTS)[0]


def paragraph(rng: random.Random, language: Language, sentences: int) -> Parts:
    """An arrival and `sentences` statements, all about one person."""
    who = person(rng)
    first = arrival(
        language, who, place(rng), rng.randint(2, 28), rng.randrange(12), rng.randint(1850, 2019)
    )
    rest = [utter(language, statement(rng), who) for _ in range(sentences)]
    return join([first, *rest], language.joiner)


def parallel(rng: random.Random, language: Language, pairs: int) -> Parts:
    """English sentences, each followed by its translation."""
    who = person(rng)
    lines: list[Parts] = []
    for said in [statement(rng) for _ in range(pairs)]:
        lines.append(["English: ", *utter(ENGLISH, said, who)])
        lines.append([f"{language.name}: ", *utter(language, said, who)])
    return join(lines, "\n")


def multilingual(rng: random.Random) -> Parts:
    """A paragraph in one foreign language, or a list of translated pairs."""
    language = foreign_language(rng)
    short = language in (GREEK, JAPANESE)
    if rng.random() < 0.4:
        return [*parallel(rng, language, rng.randint(3, 4 if short else 6)), "\n"]
    return [*paragraph(rng, language, rng.randint(5, 7 if short else 11)), "\n"]
