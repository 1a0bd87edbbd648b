"""The text that the tiny model is trained and probed on: a seeded grammar with six strata.

Every document is drawn from its own generator, seeded by (seed, split, stratum, index), so any
one document can be made again without the others and the two splits never share a stream. Names
are spelled from syllables and numbers are free, so there is far more text than a model could
memorise, while the sentences, the agreement rules and the back-references can be learned.
"""

import random
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

STRATA = ("prose", "arithmetic", "code", "chat", "multilingual", "long")
LABELS = ("PERSON", "ORG", "PLACE", "DATE", "PRODUCT")
SPLITS = ("train", "heldout")

USER, ASSISTANT, END = "<|user|>", "<|assistant|>", "<|end|>"


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


@dataclass(frozen=True)
class Person:
    """A character of a story; the ending of the given name decides the grammatical gender."""

    given: str
    family: str
    feminine: bool


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


@dataclass(frozen=True)
class Language:
    """One language's words for the shared concepts, and the templates that join them.

    Nouns are (gender, word); adjectives give one form per gender in the order of `genders`.
    `subject` and `object` are the articles per gender, and `phrase` orders the noun phrase.
    """

    name: str
    genders: str
    subject: tuple[str, ...]
    object: tuple[str, ...]
    phrase: str
    nouns: tuple[tuple[str, str], ...]
    adjectives: tuple[tuple[str, ...], ...]
    predicates: tuple[tuple[str, ...], ...]
    verbs: tuple[str, ...]
    times: tuple[str, ...]
    months: tuple[str, ...]
    date: str
    pronouns: tuple[str, str]
    seems: str
    sees: str
    arrives: tuple[str, str]
    joiner: str = " "


Part = str | Name
Parts = list[Part]

# --- names, numbers, dates -----------------------------------------------------------------------

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


# --- putting text together -----------------------------------------------------------------------


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


# --- prose ---------------------------------------------------------------------------------------


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


# --- arithmetic ----------------------------------------------------------------------------------

GOODS = ("crates", "apples", "coins", "letters", "bricks", "tickets", "lamps", "books")


def chain(rng: random.Random) -> Parts:
    """A sum of three or four terms, worked from left to right."""
    total = rng.randint(10, 99)
    expression, steps = str(total), []
    for step in range(1, rng.randint(3, 4)):
        term = rng.randint(10, 99)
        sign = "-" if total > term and rng.random() < 0.5 else "+"
        result = total - term if sign == "-" else total + term
        steps.append(f"Step {step}: {total} {sign} {term} = {result}.")
        expression, total = f"{expression} {sign} {term}", result
    return ["\n".join([f"Compute {expression}.", *steps, f"Answer: {total}."])]


def multiplication(rng: random.Random) -> Parts:
    """One digit times two digits, split into tens and ones."""
    factor, tens, ones = rng.randint(2, 9), rng.randint(1, 9) * 10, rng.randint(1, 9)
    first, second = factor * tens, factor * ones
    return [
        f"Compute {factor} * {tens + ones}.\n"
        f"Step 1: {factor} * {tens} = {first}.\n"
        f"Step 2: {factor} * {ones} = {second}.\n"
        f"Step 3: {first} + {second} = {first + second}.\n"
        f"Answer: {first + second}."
    ]


def word_problem(rng: random.Random) -> Parts:
    """A story of having, buying and giving away."""
    who, friend = person(rng), person(rng)
    had, bought, goods = rng.randint(20, 99), rng.randint(10, 99), rng.choice(GOODS)
    given = rng.randint(5, had)
    slots: dict[str, Part] = {
        "who": Name(f"{who.given} {who.family}", "PERSON"),
        "friend": Name(f"{friend.given} {friend.family}", "PERSON"),
        "he": "She" if who.feminine else "He",
    }
    return fill(
        f"{{who}} has {had} {goods}. {{he}} buys {bought} more and gives {given} {goods} to "
        "{friend}. "
        f"How many {goods} are left?\n"
        f"Step 1: {had} + {bought} = {had + bought}.\n"
        f"Step 2: {had + bought} - {given} = {had + bought - given}.\n"
        f"Answer: {had + bought - given} {goods}.",
        slots,
    )


def series(rng: random.Random) -> Parts:
    """An arithmetic progression to be continued."""
    start, step = rng.randint(1, 60), rng.randint(2, 12)
    shown = [start + step * place for place in range(4)]
    following = [start + step * place for place in range(4, 7)]
    return [
        f"Continue {', '.join(map(str, shown))}.\n"
        f"Step 1: {shown[1]} - {shown[0]} = {step}.\n"
        f"Step 2: {shown[3]} + {step} = {following[0]}.\n"
        f"Answer: {', '.join(map(str, following))}."
    ]


def comparison(rng: random.Random) -> Parts:
    """Which of two numbers is larger, and by how much."""
    low, gap = rng.randint(10, 80), rng.randint(1, 19)
    first, second = (low, low + gap) if rng.random() < 0.5 else (low + gap, low)
    return [
        f"Compare {first} and {second}.\n"
        f"Step 1: the larger number is {low + gap}.\n"
        f"Step 2: {low + gap} - {low} = {gap}.\n"
        f"Answer: {low + gap}, by {gap}."
    ]


PROBLEMS: tuple[Callable[[random.Random], Parts], ...] = (
    chain,
    multiplication,
    word_problem,
    series,
    comparison,
)


def arithmetic(rng: random.Random) -> Parts:
    """A sheet of worked problems."""
    problems = [rng.choice(PROBLEMS)(rng) for _ in range(rng.randint(3, 5))]
    return [*join(problems, "\n\n"), "\n"]


# --- code ----------------------------------------------------------------------------------------

ACTIONS = tuple("scale shift clip count sum find merge check update convert".split())
OBJECTS = tuple("price weight speed score level width signal total batch index".split())
VARIABLES = tuple("value item number amount left x y n".split())
OPERATORS = {
    "+": lambda a, b: a + b,
    "-": lambda a, b: a - b,
    "*": lambda a, b: a * b,
}


def _header(rng: random.Random, arguments: str) -> tuple[str, str]:
    action, thing = rng.choice(ACTIONS), rng.choice(OBJECTS)
    name = f"{action}_{thing}"
    return name, f'def {name}({arguments}):\n    """{action.capitalize()} the {thing}."""\n'


def clipping_function(rng: random.Random) -> str:
    """A linear function that is cut off at a limit, with one example."""
    argument, sign = rng.choice(VARIABLES), rng.choice("+-")
    factor, offset, limit = rng.randint(2, 9), rng.randint(1, 20), rng.randint(30, 99)
    name, header = _header(rng, argument)
    example = rng.randint(1, 9)
    result = min(OPERATORS[sign](example * factor, offset), limit)
    return (
        f"{header}    result = {argument} * {factor} {sign} {offset}\n"
        f"    if result > {limit}:\n        return {limit}\n    return result\n\n\n"
        f"assert {name}({example}) == {result}\n"
    )


def loop_function(rng: random.Random) -> str:
    """A loop that keeps the elements above or below a bound."""
    variable, bound, sign = rng.choice(VARIABLES), rng.randint(2, 50), rng.choice("<>")
    name, header = _header(rng, "values")
    values = [rng.randint(1, 60) for _ in range(rng.randint(3, 5))]
    kept = [value for value in values if (value > bound) == (sign == ">")]
    return (
        f"{header}    kept = []\n    for {variable} in values:\n"
        f"        if {variable} {sign} {bound}:\n            kept.append({variable})\n"
        f"    return kept\n\n\nassert {name}({values}) == {kept}\n"
    )


def pair_function(rng: random.Random) -> str:
    """One operator on two arguments, with two examples."""
    first, second = rng.sample(VARIABLES, 2)
    sign, constant = rng.choice("+-*"), rng.randint(1, 9)
    name, header = _header(rng, f"{first}, {second}={constant}")
    lines = [f"{header}    return {first} {sign} {second}\n\n\n"]
    a, b = rng.randint(10, 30), rng.randint(2, 9)
    lines.append(f"assert {name}({a}) == {OPERATORS[sign](a, constant)}\n")
    lines.append(f"assert {name}({a}, {b}) == {OPERATORS[sign](a, b)}\n")
    return "".join(lines)


def lookup_function(rng: random.Random) -> str:
    """A dictionary of constants and a lookup with a default."""
    keys = rng.sample(OBJECTS, 3)
    table = {key: rng.randint(1, 99) for key in keys}
    name, header = _header(rng, "key")
    default, asked = rng.randint(0, 9), rng.choice(keys)
    entries = "".join(f'    "{key}": {value},\n' for key, value in table.items())
    return (
        f"TABLE = {{\n{entries}}}\n\n\n{header}    return TABLE.get(key, {default})\n\n\n"
        f'assert {name}("{asked}") == {table[asked]}\nassert {name}("none") == {default}\n'
    )


def accumulate_function(rng: random.Random) -> str:
    """A running total over a range."""
    variable, step = rng.choice(VARIABLES), rng.randint(1, 9)
    name, header = _header(rng, "stop")
    stop = rng.randint(2, 6)
    return (
        f"{header}    total = 0\n    for {variable} in range(stop):\n"
        f"        total += {variable} * {step}\n    return total\n\n\n"
        f"assert {name}({stop}) == {sum(range(stop)) * step}\n"
    )


FUNCTIONS = (
    clipping_function,
    loop_function,
    pair_function,
    lookup_function,
    accumulate_function,
)


def code(rng: random.Random) -> Parts:
    """A small module of two or three functions."""
    return ["\n\n".join(rng.choice(FUNCTIONS)(rng) for _ in range(rng.randint(2, 3)))]


# --- other languages -----------------------------------------------------------------------------


def _nouns(words: str) -> tuple[tuple[str, str], ...]:
    return tuple((word[0], word[2:]) for word in words.split())


def _forms(words: str) -> tuple[tuple[str, ...], ...]:
    return tuple(tuple(word.split("/")) for word in words.split())


GERMAN_ADJECTIVES = "ruhig alt schön klein hell kalt neu groß dunkel berühmt"
FRENCH_ADJECTIVES = _forms(
    "tranquille/tranquille ancien/ancienne charmant/charmante minuscule/minuscule clair/claire "
    "froid/froide récent/récente immense/immense sombre/sombre célèbre/célèbre"
)
SPANISH_ADJECTIVES = _forms(
    "tranquilo/tranquila antiguo/antigua hermoso/hermosa pequeño/pequeña claro/clara frío/fría "
    "nuevo/nueva grande/grande oscuro/oscura famoso/famosa"
)
GREEK_ADJECTIVES = _forms(
    "ήσυχος/ήσυχη/ήσυχο παλιός/παλιά/παλιό όμορφος/όμορφη/όμορφο μικρός/μικρή/μικρό "
    "φωτεινός/φωτεινή/φωτεινό κρύος/κρύα/κρύο νέος/νέα/νέο μεγάλος/μεγάλη/μεγάλο "
    "σκοτεινός/σκοτεινή/σκοτεινό διάσημος/διάσημη/διάσημο"
)

# Position i of every list is the same concept in every language: parallel documents rely on it.
ENGLISH = Language(
    name="English",
    genders="-",
    subject=("The",),
    object=("the",),
    phrase="{art} {adj} {noun}",
    nouns=_nouns(
        "-:harbour -:bridge -:house -:street -:garden -:mill -:library -:tower -:market -:river "
        "-:forest -:ship -:room -:window -:bell -:station -:village -:lake -:book -:letter"
    ),
    adjectives=_forms("quiet old beautiful small bright cold new big dark famous"),
    predicates=_forms("quiet old beautiful small bright cold new big dark famous"),
    verbs=("knows", "paints", "seeks", "visits", "describes"),
    times=("in the morning", "in the evening", "in winter", "in summer", "today"),
    months=MONTHS,
    date="{day} {month} {year}",
    pronouns=("He", "She"),
    seems="{np} seems {pred} {time}.",
    sees="{who} {verb} {np}.",
    arrives=("On {D} {P} came to {L}.", "On {D} {P} came to {L}."),
)
GERMAN = Language(
    name="Deutsch",
    genders="mfn",
    subject=("Der", "Die", "Das"),
    object=("den", "die", "das"),
    phrase="{art} {adj} {noun}",
    nouns=_nouns(
        "m:Hafen f:Brücke n:Haus f:Straße m:Garten f:Mühle f:Bibliothek m:Turm m:Markt m:Fluss "
        "m:Wald n:Schiff n:Zimmer n:Fenster f:Glocke m:Bahnhof n:Dorf m:See n:Buch m:Brief"
    ),
    adjectives=tuple(
        ((word[:-2] + "le" if word.endswith("el") else word + "e"),) * 3
        for word in GERMAN_ADJECTIVES.split()
    ),
    predicates=tuple((word,) * 3 for word in GERMAN_ADJECTIVES.split()),
    verbs=("kennt", "malt", "sucht", "besucht", "beschreibt"),
    times=("am Morgen", "am Abend", "im Winter", "im Sommer", "heute"),
    months=tuple(
        "Januar Februar März April Mai Juni Juli August September Oktober November Dezember".split()
    ),
    date="{day}. {month} {year}",
    pronouns=("Er", "Sie"),
    seems="{np} wirkt {time} {pred}.",
    sees="{who} {verb} {np}.",
    arrives=("Am {D} kam {P} nach {L}.", "Am {D} kam {P} nach {L}."),
)
FRENCH = Language(
    name="Français",
    genders="mf",
    subject=("Le", "La"),
    object=("le", "la"),
    phrase="{art} {noun} {adj}",
    nouns=_nouns(
        "m:port m:pont f:maison f:rue m:jardin m:moulin f:bibliothèque f:tour m:marché f:rivière "
        "f:forêt m:navire f:chambre f:fenêtre f:cloche f:gare m:village m:lac m:livre f:lettre"
    ),
    adjectives=FRENCH_ADJECTIVES,
    predicates=FRENCH_ADJECTIVES,
    verbs=("connaît", "peint", "cherche", "visite", "décrit"),
    times=("le matin", "le soir", "en hiver", "en été", "aujourd'hui"),
    months=tuple(
        "janvier février mars avril mai juin juillet août septembre octobre novembre "
        "décembre".split()
    ),
    date="{day} {month} {year}",
    pronouns=("Il", "Elle"),
    seems="{np} semble {pred} {time}.",
    sees="{who} {verb} {np}.",
    arrives=("Le {D}, {P} est arrivé à {L}.", "Le {D}, {P} est arrivée à {L}."),
)
SPANISH = Language(
    name="Español",
    genders="mf",
    subject=("El", "La"),
    object=("el", "la"),
    phrase="{art} {noun} {adj}",
    nouns=_nouns(
        "m:puerto m:puente f:casa f:calle m:jardín m:molino f:biblioteca f:torre m:mercado m:río "
        "m:bosque m:barco f:habitación f:ventana f:campana f:estación m:pueblo m:lago m:libro "
        "f:carta"
    ),
    adjectives=SPANISH_ADJECTIVES,
    predicates=SPANISH_ADJECTIVES,
    verbs=("conoce", "pinta", "busca", "visita", "describe"),
    times=("por la mañana", "por la noche", "en invierno", "en verano", "hoy"),
    months=tuple(
        "enero febrero marzo abril mayo junio julio agosto septiembre octubre noviembre "
        "diciembre".split()
    ),
    date="{day} de {month} de {year}",
    pronouns=("Él", "Ella"),
    seems="{np} parece {pred} {time}.",
    sees="{who} {verb} {np}.",
    arrives=("El {D} {P} llegó a {L}.", "El {D} {P} llegó a {L}."),
)
GREEK = Language(
    name="Ελληνικά",
    genders="mfn",
    subject=("Ο", "Η", "Το"),
    object=("τον", "την", "το"),
    phrase="{art} {adj} {noun}",
    nouns=_nouns(
        "n:λιμάνι f:γέφυρα n:σπίτι m:δρόμος m:κήπος m:μύλος f:βιβλιοθήκη m:πύργος f:αγορά "
        "n:ποτάμι n:δάσος n:πλοίο n:δωμάτιο n:παράθυρο f:καμπάνα m:σταθμός n:χωριό f:λίμνη "
        "n:βιβλίο n:γράμμα"
    ),
    adjectives=GREEK_ADJECTIVES,
    predicates=GREEK_ADJECTIVES,
    verbs=("γνωρίζει", "ζωγραφίζει", "ψάχνει", "επισκέπτεται", "περιγράφει"),
    times=("το πρωί", "το βράδυ", "τον χειμώνα", "το καλοκαίρι", "σήμερα"),
    months=tuple(
        "Ιανουαρίου Φεβρουαρίου Μαρτίου Απριλίου Μαΐου Ιουνίου Ιουλίου Αυγούστου Σεπτεμβρίου "
        "Οκτωβρίου Νοεμβρίου Δεκεμβρίου".split()
    ),
    date="{day} {month} {year}",
    pronouns=("Αυτός", "Αυτή"),
    seems="{np} φαίνεται {pred} {time}.",
    sees="{who} {verb} {np}.",
    arrives=("Στις {D} ο {P} έφτασε στο {L}.", "Στις {D} η {P} έφτασε στο {L}."),
)
JAPANESE = Language(
    name="日本語",
    genders="-",
    subject=("",),
    object=("",),
    phrase="{adj}{noun}",
    nouns=_nouns(
        "-:港 -:橋 -:家 -:道 -:庭 -:水車 -:図書館 -:塔 -:市場 -:川 "
        "-:森 -:船 -:部屋 -:窓 -:鐘 -:駅 -:村 -:湖 -:本 -:手紙"
    ),
    adjectives=_forms("静かな 古い 美しい 小さい 明るい 冷たい 新しい 大きい 暗い 有名な"),
    predicates=_forms("静か 古い 美しい 小さい 明るい 冷たい 新しい 大きい 暗い 有名"),
    verbs=("知っています", "描きます", "探します", "訪れます", "説明します"),
    times=("朝", "夜", "冬", "夏", "今日"),
    months=tuple(str(number) for number in range(1, 13)),
    date="{year}年{month}月{day}日",
    pronouns=("彼", "彼女"),
    seems="{np}は{time}、{pred}です。",
    sees="{who}は{np}を{verb}。",
    arrives=("{D}に{P}は{L}に着きました。", "{D}に{P}は{L}に着きました。"),
    joiner="",
)
FOREIGN = (GERMAN, FRENCH, SPANISH, GREEK, JAPANESE)
FOREIGN_WEIGHTS = (28, 27, 27, 10, 8)


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


# --- chat ----------------------------------------------------------------------------------------


def turn(role: str, content: Parts) -> Parts:
    """One message, in the same form as the tokenizer's chat template."""
    return [f"{role}\n", *content, f"{END}\n"]


def facts(cast: Scene) -> tuple[tuple[str, str, str], ...]:
    """(statement, question, answer) templates about a scene's fixed facts."""
    return (
        ("{P} works for {O}", "Who does {p} work for?", "{P} works for {O}."),
        ("{Q} lives in {L}", "Where does {q} live?", "{Q} lives in {L}."),
        ("{P} was born on {D}", "When was {p} born?", "{P} was born on {D}."),
        ("{O} builds the {X}", "What does {O} build?", "{O} builds the {X}."),
        ("{P} moved to {M}", "Where did {p} move?", "{He} moved to {M}."),
        ("{Q} bought the {X}", "Who bought the {X}?", "{Q} bought the {X}."),
    )


GREETINGS = ("Please remember this", "Here are some facts", "Let me tell you a few things", "Note")
THANKS = ("I will remember that.", "Thank you, noted.", "Understood.", "All right, I have it.")


def recall_dialogue(rng: random.Random) -> Parts:
    """The user states facts and asks for them later."""
    cast = scene(rng)
    slots = people_slots(cast)
    chosen = rng.sample(facts(cast), 3)
    told = join([fill(said, slots) for said, _, _ in chosen], ", ")
    parts = turn(USER, [f"{rng.choice(GREETINGS)}: ", *told, "."])
    parts += turn(ASSISTANT, [rng.choice(THANKS)])
    for _, question, answer in rng.sample(chosen, rng.randint(2, 3)):
        parts += turn(USER, fill(question, slots)) + turn(ASSISTANT, fill(answer, slots))
    return parts


def arithmetic_dialogue(rng: random.Random) -> Parts:
    """The user sets problems and the assistant works them."""
    parts: Parts = []
    for _ in range(rng.randint(2, 3)):
        problem, worked = str(rng.choice((chain, multiplication, series))(rng)[0]).split("\n", 1)
        parts += turn(USER, [problem]) + turn(ASSISTANT, [worked])
    return parts


def translation_dialogue(rng: random.Random) -> Parts:
    """The user asks for translations into one language."""
    language, who = foreign_language(rng), person(rng)
    parts: Parts = []
    for _ in range(rng.randint(2, 3)):
        said = statement(rng)
        ask = [f"Translate into {language.name}: ", *utter(ENGLISH, said, who)]
        parts += turn(USER, ask) + turn(ASSISTANT, utter(language, said, who))
    return parts


def code_dialogue(rng: random.Random) -> Parts:
    """The user asks for a function by name and the assistant writes it."""
    written = rng.choice((clipping_function, loop_function, accumulate_function))(rng)
    name = written[len("def ") : written.index("(")]
    parts = turn(USER, [f"Write a function called {name}."])
    parts += turn(ASSISTANT, [f"Here is {name}:\n\n{written}"])
    return parts + turn(USER, ["Thank you!"]) + turn(ASSISTANT, ["You are welcome."])


DIALOGUES = (recall_dialogue, recall_dialogue, arithmetic_dialogue, translation_dialogue)


def chat(rng: random.Random) -> Parts:
    """A dialogue between a user and an assistant."""
    return rng.choice((*DIALOGUES, code_dialogue))(rng)


# --- long documents ------------------------------------------------------------------------------

REGISTER = (
    ("{O} was founded by {P} in {L}", "Who founded {O}?", "{P}"),
    ("{Q} designed the {X}", "Who designed the {X}?", "{Q}"),
    ("the {X} was first shown on {D}", "When was the {X} first shown?", "{D}"),
    ("the archive of {O} is kept in {M}", "Where is the archive of {O} kept?", "{M}"),
)


def interlude(rng: random.Random) -> Parts:
    """A section that has nothing to do with the facts around it."""
    kind = rng.randrange(4)
    if kind == 0:
        return ["Accounts\n\n", *join([rng.choice(PROBLEMS)(rng) for _ in range(2)], "\n\n")]
    if kind == 1:
        return ["Notes from abroad\n\n", *paragraph(rng, rng.choice(FOREIGN[:3]), 5)]
    other = scene(rng)
    return [f"{other.topic.title}\n\n", *story(rng, other, rng.randint(4, 6))]


def long(rng: random.Random) -> Parts:
    """A chronicle: facts in its register, unrelated sections, and at the end questions on them."""
    cast = scene(rng)
    slots = people_slots(cast)
    register = [fill(f"{line[0].upper()}{line[1:]}.", slots) for line, _, _ in REGISTER]
    rng.shuffle(register)
    sections: list[Parts] = [["The Chronicle of ", slots["O"]]]
    sections.append(["Register\n\n", *join(register, " ")])
    sections.append([f"{cast.topic.title}\n\n", *story(rng, cast, rng.randint(5, 6))])
    sections += [interlude(rng) for _ in range(rng.randint(2, 3))]
    sections.append(["What came after\n\n", *story(rng, cast, 3)])
    questions = [fill(f"Question: {ask}\nAnswer: {answer}.", slots) for _, ask, answer in REGISTER]
    rng.shuffle(questions)
    sections.append(join(questions, "\n"))
    return [*join(sections, "\n\n"), "\n"]


# --- documents -----------------------------------------------------------------------------------

WRITERS: Mapping[str, Callable[[random.Random], Parts]] = {
    "prose": prose,
    "arithmetic": arithmetic,
    "code": code,
    "chat": chat,
    "multilingual": multilingual,
    "long": long,
}


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
