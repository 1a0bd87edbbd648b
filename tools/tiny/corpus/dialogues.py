"""Chats between a user and an assistant, in the form of the tokenizer's chat template."""

import random

from tiny.corpus.functions import accumulate_function, clipping_function, loop_function
from tiny.corpus.languages import ENGLISH
from tiny.corpus.names import person
from tiny.corpus.problems import chain, multiplication, series
from tiny.corpus.stories import Scene, people_slots, scene
from tiny.corpus.text import Parts, fill, join
from tiny.corpus.translations import foreign_language, statement, utter

USER, ASSISTANT, END = "<|user|>", "<|assistant|>", "<|end|>"


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
