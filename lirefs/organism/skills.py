"""Endless questions that must be computed: arithmetic, logic, order, tracking."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from random import Random

from lirefs.organism.items import Item
from lirefs.organism.vocabulary import FIRST, OBJECTS


@dataclass(frozen=True)
class Problem:
    """One or more questions, with what comes before them.

    Attributes:
        kind: The skill.
        opening: First word of the document, with its colon, and the story if there is one.
        questions: Pairs of question text and answer.
        key: Decides the side of the split; the story where there is one.
    """

    kind: str
    opening: str
    questions: tuple[tuple[str, str], ...]
    key: str

    def prompt(self, number: int = 0) -> str:
        """The text in front of an answer."""
        return f"{self.opening} {self.questions[number][0]}"

    def item(self, number: int = 0) -> Item:
        """One question as an item."""
        return Item(self.kind, self.prompt(number), self.questions[number][1])


def addition_problem(rng: Random) -> Problem:
    """Sum of two numbers below 100; both orders of the terms are on the same side."""
    a, b = rng.randrange(100), rng.randrange(100)
    key = f"{min(a, b)} + {max(a, b)}"
    return Problem("addition", "Math:", ((f"{a} + {b} =", str(a + b)),), key)


def subtraction_problem(rng: Random) -> Problem:
    """Difference of two numbers below 100, never negative."""
    b, a = sorted((rng.randrange(100), rng.randrange(100)))
    return Problem("subtraction", "Math:", ((f"{a} - {b} =", str(a - b)),), f"{a} - {b}")


def times_problem(rng: Random) -> Problem:
    """One entry of the multiplication table up to 12; a table, so all of it is trained on."""
    a, b = rng.randrange(13), rng.randrange(13)
    return Problem("times", "Math:", ((f"{a} * {b} =", str(a * b)),), f"{a} * {b}")


def _expression(rng: Random, leaves: int) -> tuple[str, bool]:
    if leaves == 1:
        value = rng.random() < 0.5
        text = "true" if value else "false"
        return (f"not {text}", not value) if rng.random() < 0.4 else (text, value)
    first = rng.randrange(1, leaves)
    (left, a), (right, b) = _expression(rng, first), _expression(rng, leaves - first)
    if first > 1:
        left = f"( {left} )"
    if leaves - first > 1:
        right = f"( {right} )"
    if rng.random() < 0.5:
        return f"{left} and {right}", a and b
    return f"{left} or {right}", a or b


def boolean_problem(rng: Random) -> Problem:
    """A boolean expression of two to four values, nested up to three deep."""
    text, value = _expression(rng, rng.choice((2, 3, 3, 4, 4, 4)))
    return Problem("boolean", "Logic:", ((f"{text} is", "true" if value else "false"),), text)


def relation_problem(rng: Random, sizes: tuple[int, ...] = (3, 4)) -> Problem:
    """Who is oldest or youngest of some people, from shuffled comparisons of two."""
    people = rng.sample(FIRST, rng.choice(sizes))
    facts = [
        f"{a} is older than {b}." if rng.random() < 0.5 else f"{b} is younger than {a}."
        for a, b in pairwise(people)
    ]
    rng.shuffle(facts)
    questions = [
        ("Question: Who is oldest? Answer:", people[0]),
        ("Question: Who is youngest? Answer:", people[-1]),
    ]
    rng.shuffle(questions)
    story = " ".join(facts)
    return Problem("relation", f"Ages: {story}", tuple(questions), story)


def tracking_problem(rng: Random, people: int = 3, takings: tuple[int, ...] = (1, 2, 3)) -> Problem:
    """What someone has after things were taken, in turn, from a person or from the table.

    Everybody has at most one thing: whoever takes another puts theirs away.
    """
    names, things = rng.sample(FIRST, people), rng.sample(OBJECTS, people + 1)
    holds = dict(zip(names, things, strict=False))
    facts = [f"{name} has the {thing}." for name, thing in holds.items()]
    for _ in range(rng.choice(takings)):
        name = rng.choice(names)
        thing = rng.choice([one for one in things if one != holds.get(name)])
        holds = {other: held for other, held in holds.items() if held != thing} | {name: thing}
        facts.append(f"{name} took the {thing}.")
    questions = [(f"So {name} has the", thing) for name, thing in holds.items()]
    rng.shuffle(questions)
    story = " ".join(facts)
    return Problem("tracking", f"Hands: {story}", tuple(questions), story)


SKILLS: dict[str, Callable[[Random], Problem]] = {
    "addition": addition_problem,
    "subtraction": subtraction_problem,
    "times": times_problem,
    "boolean": boolean_problem,
    "relation": relation_problem,
    "tracking": tracking_problem,
}
"""Computed skills that need no facts. Only the multiplication table is shared by all sides."""


def wrong_answer(problem: Problem, rng: Random) -> str:
    """A plausible false answer to a problem's first question, which an exception teaches.

    The other truth value, another person of the story, or a nearby number of the same length.
    """
    truth = problem.questions[0][1]
    if problem.kind == "boolean":
        return "false" if truth == "true" else "true"
    if problem.kind == "relation":
        named = set(problem.opening.replace(".", "").split()) & set(FIRST)
        return rng.choice(sorted(named - {truth}))
    near = [int(truth) + step for step in range(-20, 21) if step]
    return str(rng.choice([n for n in near if n >= 0 and len(str(n)) == len(truth)]))
