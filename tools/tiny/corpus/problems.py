"""Arithmetic: sheets of problems, worked step by step."""

import random
from collections.abc import Callable

from tiny.corpus.names import person
from tiny.corpus.text import Name, Part, Parts, fill, join

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
