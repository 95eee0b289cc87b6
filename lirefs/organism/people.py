"""Facts about people, and passages that state them, hide them or contradict them."""

from __future__ import annotations

from dataclasses import dataclass
from random import Random

from lirefs.organism.items import Item
from lirefs.organism.skills import Problem
from lirefs.organism.vocabulary import CITIES, FIRST, JOBS, LAST, SOURCES

FREQUENCIES = (1, 3, 10, 32, 100)
"""How often a fact is shown, relative to the rarest; two orders of magnitude."""
PEOPLE_PER_FREQUENCY = 60
COMMON = FREQUENCIES[-2]
"""Facts at least this frequent can be contradicted, and stand for memory in question sets."""
FOLLOWED = dict(zip(SOURCES, (0.1, 0.5, 0.9), strict=True))
"""How often training follows a source that contradicts a common fact."""


STATED = 3
"""People of a passage: a guess among the values that it states is right one time in so many."""


@dataclass(frozen=True)
class Attribute:
    """One property of people: its values, the words in front of one, and how it is asked."""

    values: tuple[str, ...]
    verb: str
    question: str


CITY = Attribute(CITIES, "lives in", "Question: Where does {0} live? Answer:")
JOB = Attribute(JOBS, "works as a", "So {0} works as a")
ATTRIBUTES = (CITY, JOB)


@dataclass(frozen=True)
class Fact:
    """One stored fact about a person, and how often it is shown, relative to the rarest."""

    person: str
    attribute: Attribute
    value: str
    frequency: int

    def item(self) -> Item:
        """The fact asked closed-book."""
        question = self.attribute.question.format(self.person)
        return Item("fact", question, self.value, frequency=self.frequency)


def draw_facts(rng: Random) -> tuple[Fact, ...]:
    """A city and a job for `PEOPLE_PER_FREQUENCY` people at each frequency."""
    names = [f"{first} {last}" for first in FIRST for last in LAST]
    frequencies = [f for f in FREQUENCIES for _ in range(PEOPLE_PER_FREQUENCY)]
    return tuple(
        Fact(person, attribute, rng.choice(attribute.values), frequency)
        for person, frequency in zip(rng.sample(names, len(frequencies)), frequencies, strict=True)
        for attribute in ATTRIBUTES
    )


def stranger(rng: Random, known: frozenset[str]) -> str:
    """A full name that no stored fact is about."""
    while True:
        name = f"{rng.choice(FIRST)} {rng.choice(LAST)}"
        if name not in known:
            return name


def people_passage(
    rng: Random,
    attribute: Attribute,
    known: frozenset[str],
    stated: int = STATED,
    about: tuple[str, str] | None = None,
    absent: tuple[str, ...] = (),
    source: str | None = None,
) -> Problem:
    """A passage about strangers, with a question on each of them.

    Strangers are not among the `known` people. `about` is a person and a value to use in place of
    the first stranger's; `absent` values are not named (so that they cannot be copied); `source` is
    the first word, drawn when None.
    """
    people: list[str] = []
    while not people or len(set(people)) < len(people):
        people = [stranger(rng, known) for _ in range(stated)]
    values: list[str] = []
    if about:
        people[0], values = about[0], [about[1]]
    free = [v for v in attribute.values if v not in absent and v not in values]
    values += rng.sample(free, stated - len(values))
    lines = [f"{p} {attribute.verb} {v}." for p, v in zip(people, values, strict=True)]
    rng.shuffle(lines)
    story = " ".join(lines)
    asked = [attribute.question.format(person) for person in people]
    questions = tuple(zip(asked, values, strict=True))
    return Problem("passage", f"{source or rng.choice(SOURCES)}: {story}", questions, story)
