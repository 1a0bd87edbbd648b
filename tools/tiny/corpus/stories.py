"""Prose: short stories about a cast, each in the words of one topic."""

import random
from dataclasses import dataclass

from tiny.corpus.names import Person, date, month, org, person, place, product
from tiny.corpus.text import Name, Part, Parts, fill, join


@dataclass(frozen=True)
class Topic:
    """The words that go together in one kind of story."""

    title: str
    nouns: tuple[str, ...]
    adjectives: tuple[str, ...]
    verbs: tuple[str, ...]


@dataclass(frozen=True)
class Scene:
    """Who and what a text is about: its facts stay the same from the first line to the last."""

    hero: Person
    other: Person
    org: str
    place: str
    far_place: str
    date: str
    product: str
    topic: Topic


def _topic(title: str, nouns: str, adjectives: str, verbs: str) -> Topic:
    return Topic(title, tuple(nouns.split()), tuple(adjectives.split()), tuple(verbs.split()))


TOPICS = (
    _topic(
        "The Harbour",
        "barge buoy lantern sail rope quay tide crane",
        "salty tarred northern leaking narrow",
        "moored loaded repaired launched painted",
    ),
    _topic(
        "The Observatory",
        "telescope globe comet dome chart moon clock mirror",
        "distant polished silver faint lunar",
        "observed measured recorded focused aligned",
    ),
    _topic(
        "The Orchard",
        "pear ladder basket hedge cellar blossom cider beehive",
        "ripe sweet frosty sunny tangled",
        "planted pruned harvested watered pressed",
    ),
    _topic(
        "The Workshop",
        "lathe hammer chisel gear furnace spring valve motor",
        "steel greasy rusty heavy precise",
        "forged welded assembled sharpened tested",
    ),
    _topic(
        "The Archive",
        "ledger letter map shelf seal manuscript scroll folio",
        "dusty faded bound secret numbered",
        "copied catalogued restored translated signed",
    ),
    _topic(
        "The Theatre",
        "curtain stage singer costume violin script mask lamp",
        "velvet crowded golden tragic noisy",
        "rehearsed performed staged applauded directed",
    ),
    _topic(
        "The Railway",
        "signal platform tunnel carriage bridge timetable whistle boiler",
        "rapid steep delayed crowded mountain",
        "inspected coupled extended opened surveyed",
    ),
    _topic(
        "The Clinic",
        "ward nurse syringe bandage thermometer patient needle vaccine",
        "clean feverish gentle fragile sterile",
        "treated examined ordered tested weighed",
    ),
)

OPENINGS = (
    "{P} came to {L} in {month} to work for {O}.",
    "On the advice of {Q}, {P} founded {O} in {L}.",
    "{P} was born in {M} but spent most of {his} life in {L}.",
    "In {L}, everyone at {O} knew {P}.",
    "When {O} opened in {L}, {P} was the first person it hired.",
    "{O} of {L} showed the {X} of {P} on {D}.",
    "The story of the {X} begins in {L}, where {P} met {Q}.",
)
SENTENCES = (
    "{He} {verb} the {adj} {noun} before anyone else was awake.",
    "{He} {verb} the {noun} and {verb2} the {noun2}.",
    "The {adj} {noun} belonged to {O}, and {p} was proud of it.",
    "{p} kept a {noun} beside the {adj2} {noun2}.",
    "According to {O}, the {X} was finished on {D}.",
    "{q} {verb} a {adj} {noun} for {p}.",
    "Nobody in {L} had seen such a {adj} {noun}.",
    "The {noun} cost {n} crowns, which {O} paid at once.",
    "Later {p} sold the {X} to a museum in {M}.",
    "From {L} to {M} the journey took {n} hours.",
    "{q} wrote to {p} from {M} about the {noun2}.",
    "Without the {X}, the {noun} could not be {verb}.",
    "{p} and {q} {verb} {n} {noun}s in a single week.",
    "The {noun} was {adj}, but the {noun2} was {adj2}.",
    'On {D} {p} told {q}: "The {noun} is ready."',
    "{He} returned to {L} with {his} {adj} {noun}.",
    "At {O}, {q} looked after the {noun2} and the {X}.",
    "If the {noun} had not been {adj}, {q} would have left for {M}.",
    "{P} still remembers how {he} {verb} the first {noun}.",
    "For {n} days the {noun2} stayed in {L}.",
    "Because the {noun} was {adj}, {he} {verb} it again.",
    "{O} gave {Q} the {adj2} {noun2} in return.",
)
CLOSINGS = (
    "Today the {X} stands in {L}, and the name of {P} is written on it.",
    "{P} left {O} soon after {D}.",
    "That is how {O} came to own the {X}.",
    "In the end {p} stayed in {L} and {q} went back to {M}.",
    "The people of {L} still tell the story of {P} and {Q}.",
)


def scene(rng: random.Random) -> Scene:
    """A fresh cast and setting."""
    return Scene(
        person(rng),
        person(rng),
        org(rng),
        place(rng),
        place(rng),
        date(rng),
        product(rng),
        rng.choice(TOPICS),
    )


def people_slots(cast: Scene) -> dict[str, Part]:
    """The slots that stay fixed in a scene: its names, and the hero's pronouns."""
    hero, other = cast.hero, cast.other
    return {
        "P": Name(f"{hero.given} {hero.family}", "PERSON"),
        "p": Name(hero.family, "PERSON"),
        "Q": Name(f"{other.given} {other.family}", "PERSON"),
        "q": Name(other.family, "PERSON"),
        "O": Name(cast.org, "ORG"),
        "L": Name(cast.place, "PLACE"),
        "M": Name(cast.far_place, "PLACE"),
        "D": Name(cast.date, "DATE"),
        "X": Name(cast.product, "PRODUCT"),
        "He": "She" if hero.feminine else "He",
        "he": "she" if hero.feminine else "he",
        "his": "her" if hero.feminine else "his",
    }


def word_slots(rng: random.Random, topic: Topic) -> dict[str, Part]:
    """The slots that are drawn again for every sentence."""
    noun, noun2 = rng.sample(topic.nouns, 2)
    adjective, adjective2 = rng.sample(topic.adjectives, 2)
    verb, verb2 = rng.sample(topic.verbs, 2)
    return {
        "noun": noun,
        "noun2": noun2,
        "adj": adjective,
        "adj2": adjective2,
        "verb": verb,
        "verb2": verb2,
        "n": str(rng.randint(2, 99)),
        "month": Name(month(rng), "DATE"),
    }


def story(rng: random.Random, cast: Scene, sentences: int) -> Parts:
    """A paragraph about the scene: an opening, `sentences` middle sentences and a closing."""
    chosen = [rng.choice(OPENINGS), *rng.sample(SENTENCES, sentences), rng.choice(CLOSINGS)]
    slots = people_slots(cast)
    return join([fill(line, slots | word_slots(rng, cast.topic)) for line in chosen], " ")


def prose(rng: random.Random) -> Parts:
    """A short story with a title."""
    cast = scene(rng)
    return [f"{cast.topic.title}\n\n", *story(rng, cast, rng.randint(6, 10)), "\n"]
