"""Long documents: facts, unrelated sections, and at the end questions on the facts."""

import random

from tiny.corpus.languages import FOREIGN
from tiny.corpus.problems import PROBLEMS
from tiny.corpus.stories import people_slots, scene, story
from tiny.corpus.text import Parts, fill, join
from tiny.corpus.translations import paragraph

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
