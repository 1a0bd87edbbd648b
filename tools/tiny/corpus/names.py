"""Made-up names of people, places, organisations and machines, and dates."""

import random
from dataclasses import dataclass

ONSETS = tuple("b d f g h k l m n p r s t v z br dr gr kr st tr".split())
VOWELS = ("a", "e", "i", "o", "u", "ai", "ei")
CODAS = ("l", "n", "r", "s", "nd", "rk", "lm", "")
FEMININE, MASCULINE = ("a", "ia", "ena"), ("o", "us", "ek")
FAMILY_ENDINGS = ("son", "ing", "ford", "well", "man", "dale")
ORG_KINDS = ("Labs", "Works", "Institute", "Bank", "Museum", "Press", "Society", "Trust")
PLACE_FORMS = ("Port {}", "Lake {}", "{}burg", "{}ton", "{} Bay", "Mount {}", "{}haven")
PRODUCT_ENDINGS = ("ex", "on", "ix", "or", "um")
MONTHS = tuple(
    "January February March April May June July August September October November December".split()
)


@dataclass(frozen=True)
class Person:
    """A character of a story; the ending of the given name decides the grammatical gender."""

    given: str
    family: str
    feminine: bool


def syllables(rng: random.Random, count: int) -> str:
    """A capitalised made-up stem of `count` syllables."""
    spelled = [rng.choice(ONSETS) + rng.choice(VOWELS) for _ in range(count)]
    return ("".join(spelled) + rng.choice(CODAS)).capitalize()


def person(rng: random.Random) -> Person:
    """A new character."""
    feminine = rng.random() < 0.5
    stem = syllables(rng, 1).rstrip("aeiou") or "L"
    stem = stem if len(stem) > 1 else stem + rng.choice("aeiou") + rng.choice("lmnrt")
    given = stem + rng.choice(FEMININE if feminine else MASCULINE)
    return Person(given, syllables(rng, 1) + rng.choice(FAMILY_ENDINGS), feminine)


def place(rng: random.Random) -> str:
    """The name of a town, bay, lake or mountain."""
    return rng.choice(PLACE_FORMS).format(syllables(rng, rng.randint(1, 2)))


def org(rng: random.Random) -> str:
    """The name of an organisation."""
    return f"{syllables(rng, 2)} {rng.choice(ORG_KINDS)}"


def product(rng: random.Random) -> str:
    """The name of a machine, with its model number."""
    stem = syllables(rng, 1).rstrip("aeiou")
    return f"{stem}{rng.choice(PRODUCT_ENDINGS)} {rng.randint(1, 9) * 100 + rng.randint(0, 9) * 10}"


def date(rng: random.Random) -> str:
    """An English date."""
    return f"{rng.randint(1, 28)} {month(rng)}"


def month(rng: random.Random) -> str:
    """A month of a year."""
    return f"{rng.choice(MONTHS)} {rng.randint(1850, 2019)}"
