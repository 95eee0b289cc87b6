"""Items generated from a seed, in any number; the same seed gives the same items."""

from __future__ import annotations

import random
from collections.abc import Callable

from lirefs.errors import TaskError, checked_seed
from lirefs.tasks.shipped_data import shipped_table

ChoiceItem = tuple[str, str, list[str], int]
AnswerItem = tuple[str, str, list[str]]
Choice = tuple[str, list[str], str]
"""Text, options and the right one of them."""


def addition_items(n: int, seed: int = 0) -> list[AnswerItem]:
    """Sums of two two-digit numbers, with five answered examples before each."""
    return _answers(
        _problems("+", n + 5, f"addition {checked_seed(seed, TaskError)}"), "What is {}? Answer:"
    )


def simple_math_items(n: int, seed: int = 0) -> list[AnswerItem]:
    """SimpleMath: two-digit addition and subtraction, five answered examples, no other text.

    Differences may be negative. Source: Merullo et al. 2025, section 5, which gives neither seed
    nor number of items.
    """
    return _answers(_problems("+-", n + 5, f"simple math {checked_seed(seed, TaskError)}"), "{} =")


def _problems(signs: str, n: int, seed: str) -> list[tuple[str, str]]:
    """Distinct two-digit problems such as `12 + 34`, each with its value."""
    problems = [(a, sign, b) for sign in signs for a in range(10, 100) for b in range(10, 100)]
    return [
        (f"{a} {sign} {b}", str(a + b if sign == "+" else a - b))
        for a, sign, b in random.Random(seed).sample(problems, n)
    ]


def boar_etruscan(word: str) -> str:
    """A lower-case word with its initial consonants moved to the end, then `eb`."""
    first = next(index for index, letter in enumerate(word) if letter in "aeiou")
    return word[first:] + word[:first] + "eb"


def boar_items(n: int, seed: int = 0) -> list[AnswerItem]:
    """Phrases of two words to translate into Boar Etruscan, after the rule and five examples.

    Source: the encoding of McCoy et al. 2023, used by Merullo et al. 2025, section 5; rule text,
    words and examples are this project's.
    """
    boar = shipped_table("boar_etruscan.toml")
    adjectives, nouns = boar["adjectives"].split(), boar["nouns"].split()
    phrases = [f"{adjective} {noun}" for adjective in adjectives for noun in nouns]
    chosen = random.Random(f"boar {checked_seed(seed, TaskError)}").sample(phrases, n + 5)
    pairs = [(one, " ".join(boar_etruscan(word) for word in one.split())) for one in chosen]
    return _answers(pairs, "English: {}\nBoar Etruscan:", "\n\n", boar["rule"])


def _answers(
    pairs: list[tuple[str, str]], prompt: str, separator: str = "\n", preamble: str = ""
) -> list[AnswerItem]:
    """Items from pairs of a text and its answer, of which the first five are answered examples."""
    shots = "".join(f"{prompt.format(text)} {answer}{separator}" for text, answer in pairs[:5])
    before = preamble + shots
    return [(text, before + prompt.format(text), [answer]) for text, answer in pairs[5:]]


def boolean_items(n: int, seed: int = 0) -> list[ChoiceItem]:
    """Boolean expressions of depth two or three, with four answered examples before each."""
    generator = random.Random(f"boolean {checked_seed(seed, TaskError)}")

    def expression(depth: int) -> tuple[str, bool]:
        if depth == 0:
            value = generator.random() < 0.5
            return str(value), value
        left, x = expression(depth - 1)
        if generator.random() < 0.25:
            return f"not ( {left} )", not x
        right, y = expression(generator.randrange(depth))
        word = generator.choice(("and", "or"))
        return f"( {left} ) {word} ( {right} )", (x and y) if word == "and" else (x or y)

    wanted = [True, False, False, True] + [bool(i % 2) for i in range(n)]
    drawn: dict[str, bool] = {}
    while len(drawn) < len(wanted):
        text, value = expression(generator.choice((2, 3)))
        text = text.replace("( True )", "True").replace("( False )", "False") + " is"
        if text not in drawn and value == wanted[len(drawn)]:  # as many true as false ones
            drawn[text] = value
    return _choices("boolean", [(text, ["True", "False"], str(drawn[text])) for text in drawn])


_NAMES = ("Tom", "Ann", "Bob", "Eve", "Max", "Sue", "Dan", "Kim", "Leo", "Mia")
_OBJECTS = ("book", "key", "ball", "cup", "hat")
_COLOURS = ("red", "blue", "green", "yellow")


def tracking_items(n: int, seed: int = 0) -> list[ChoiceItem]:
    """Who holds an object after three hand-overs, with four answered examples before each."""

    def draw(generator: random.Random) -> Choice:
        a, b, c, d = generator.sample(_NAMES, 4)
        thing = generator.choice(_OBJECTS)
        steps = " ".join(f"{x} gives the {thing} to {y}." for x, y in ((a, b), (b, c), (c, d)))
        return f"{steps} The {thing} is now with", [a, b, c, d], d

    return _shuffled_choices("tracking", n, seed, draw)


def elimination_items(n: int, seed: int = 0) -> list[ChoiceItem]:
    """The one colour left for the third person, with four answered examples before each."""

    def draw(generator: random.Random) -> Choice:
        a, b, c = generator.sample(_NAMES, 3)
        x, y, z = generator.sample(_COLOURS, 3)
        text = f"{a}, {b} and {c} have a {x}, a {y} and a {z} hat."
        return f"{text} {a} has the {x} hat. {b} has the {y} hat. {c} has the", [x, y, z], z

    return _shuffled_choices("elimination", n, seed, draw)


def _shuffled_choices(
    name: str, n: int, seed: int, draw: Callable[[random.Random], Choice]
) -> list[ChoiceItem]:
    generator = random.Random(f"{name} {checked_seed(seed, TaskError)}")
    drawn: dict[str, Choice] = {}
    while len(drawn) < n + 4:
        text, options, answer = draw(generator)
        generator.shuffle(options)  # the position of an option must not give the answer away
        drawn.setdefault(text, (text, options, answer))
    return _choices(name, list(drawn.values()))


def _choices(name: str, rows: list[Choice]) -> list[ChoiceItem]:
    """Multiple-choice items from rows of which the first four are answered examples."""
    shots = "".join(f"{text} {answer}\n" for text, _, answer in rows[:4])
    return [
        (f"{name}-{index}", shots + text, [f" {one}" for one in options], options.index(answer))
        for index, (text, options, answer) in enumerate(rows[4:])
    ]
