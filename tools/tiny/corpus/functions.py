"""Code: small Python functions, each with examples of what it returns."""

import random

from tiny.corpus.text import Parts

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
