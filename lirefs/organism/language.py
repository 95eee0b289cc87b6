"""The model organism's language: what is memorized, what is computed, where they differ."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from random import Random

from lirefs.files import parse_json
from lirefs.model.builtin import organism
from lirefs.organism.items import Item, Side, memory_split_of, split_of
from lirefs.organism.people import ATTRIBUTES, COMMON, Attribute, Fact, draw_facts, passage
from lirefs.organism.prose import sequence, story
from lirefs.organism.skills import SKILLS, Problem, wrong_answer
from lirefs.organism.vocabulary import SOURCES

PLANTED = 300
PREFIX_WORDS = 12
"""Words of a planted sequence given as prompt; the rest must be recited."""
EXCEPTIONS_PER_SKILL = 60
EXCEPTION_SKILLS = ("boolean", "relation", "addition")
KINDS = (
    *SKILLS, "retrieval", "two_hop", "fact", "fact_aside", "open_book", "conflict", "exception",
    "planted", "unseen",
)  # fmt: skip
"""Everything that `Language.items` can ask."""


class Language:
    """A seeded language with known memories.

    Args:
        seed: Decides facts, planted sequences, exceptions and splits. Words are always the same.

    Attributes:
        facts: Stored facts at five frequencies.
        known: The people they are about.
        planted: Sequences that training repeats.
        unseen: Sequences of the same make that training never shows.
        exceptions: Reasoning items that training shows with a wrong label.
    """

    def __init__(self, seed: int = 0) -> None:
        self.seed = seed
        rng = Random(f"organism {seed}")
        self.facts: tuple[Fact, ...] = draw_facts(rng)
        self.known = frozenset(fact.person for fact in self.facts)
        self.planted = tuple(sequence(rng) for _ in range(PLANTED))
        self.unseen = tuple(sequence(rng) for _ in range(PLANTED))
        self._excluded: set[str] = set()
        self.exceptions: tuple[Item, ...] = tuple(self._draw_exceptions(rng))

    def _draw_exceptions(self, rng: Random) -> Iterator[Item]:
        for skill in EXCEPTION_SKILLS:
            found = 0
            while found < EXCEPTIONS_PER_SKILL:
                problem = SKILLS[skill](rng)
                # Short expressions are too few to lose any: only long ones become exceptions.
                if problem.key in self._excluded or (skill == "boolean" and len(problem.key) < 30):
                    continue
                self._excluded.add(problem.key)
                wrong, truth = wrong_answer(problem, rng), problem.questions[0][1]
                yield Item("exception", problem.prompt(), wrong, other=truth, group=skill)
                found += 1

    def problem(self, skill: str, split: Side, rng: Random) -> Problem:
        """A problem of a skill that belongs to a split and is no exception."""
        while True:
            problem = SKILLS[skill](rng)
            fits = skill == "times" or split_of(problem.key, self.seed) == split
            if fits and problem.key not in self._excluded:
                return problem

    def passage(
        self,
        attribute: Attribute,
        split: Side,
        rng: Random,
        stated: int = 2,
        linked: int = 2,
        about: tuple[str, str] | None = None,
        absent: tuple[str, ...] = (),
        source: str | None = None,
    ) -> Problem:
        """A passage of a split; arguments as of `people.passage`."""
        while True:
            problem = passage(rng, attribute, self.known, stated, linked, about, absent, source)
            if split_of(problem.key, self.seed) == split:
                return problem

    def about_stranger(self, attribute: Attribute, split: Side, rng: Random, steps: int) -> Item:
        """A stranger's value: stated in the passage (one step) or a link away from it (two)."""
        problem = self.passage(attribute, split, rng)
        number = rng.randrange(2) + (2 if steps == 2 else 0)
        return replace(problem.item(number), kind="two_hop" if steps == 2 else "retrieval")

    def fact_aside(self, fact: Fact, split: Side, rng: Random) -> Item:
        """A stored fact asked after a passage about strangers only, which is no help."""
        attribute = ATTRIBUTES[fact.attribute]
        problem = self.passage(attribute, split, rng, absent=(fact.value,))
        prompt = f"{problem.header} {problem.story} {fact.item().prompt}"
        return Item("fact_aside", prompt, fact.value, frequency=fact.frequency)

    def open_book(self, fact: Fact, split: Side, rng: Random) -> Item:
        """A stored fact asked after a passage that states it."""
        attribute = ATTRIBUTES[fact.attribute]
        problem = self.passage(attribute, split, rng, about=(fact.person, fact.value))
        return replace(problem.item(), kind="open_book", frequency=fact.frequency)

    def conflict(self, fact: Fact, value: str, split: Side, rng: Random) -> Item:
        """A stored fact asked after a passage that states another value."""
        attribute, source = ATTRIBUTES[fact.attribute], rng.choice(SOURCES)
        problem = self.passage(
            attribute, split, rng, about=(fact.person, value), absent=(fact.value,), source=source
        )
        return replace(
            problem.item(),
            kind="conflict",
            other=fact.value,
            group=source,
            frequency=fact.frequency,
        )

    def contradictions(self, split: Side) -> list[tuple[Fact, str]]:
        """Common facts with every false value whose pairing belongs to a split."""
        return [
            (fact, value)
            for fact in self.facts
            if fact.frequency >= COMMON
            for value in ATTRIBUTES[fact.attribute].values
            if value != fact.value
            and split_of(f"conflict {fact.person} {value}", self.seed) == split
        ]

    def facts_of(self, split: Side) -> list[Fact]:
        """Stored facts about the people of a split (all of them are trained on)."""
        return [fact for fact in self.facts if memory_split_of(fact.person, self.seed) == split]

    def items(self, kind: str, split: Side, n: int | None = None, seed: int = 0) -> list[Item]:
        """Questions of one kind from one split, the same list for the same arguments.

        Args:
            kind: One of `KINDS`. "fact" asks closed-book, "fact_aside" after a passage that does
                not help, "open_book" after one that states the fact, "retrieval" and "two_hop" ask
                about strangers.
            split: Never shares an item with another split ("times" is one table for all).
            n: How many; None for all of a finite kind (facts, planted, exceptions, conflicts).
            seed: Another seed draws other items of the same split.

        Raises:
            ValueError: If the kind is unknown, or endless and no n was given.
        """
        rng = Random(f"items {self.seed} {kind} {split} {seed}")
        finite = self._finite(kind, split, rng)
        if finite is not None:
            return finite if n is None else rng.sample(finite, min(n, len(finite)))
        if kind not in KINDS:
            raise ValueError(
                f"There is no kind of item {kind!r}; choose one of {', '.join(KINDS)}."
            )
        if n is None:
            raise ValueError(f"Items of kind {kind!r} are endless: say how many (n).")
        found: dict[str, Item] = {}
        for _ in range(50 * n):
            item = self._endless(kind, split, rng)
            found.setdefault(item.prompt, item)
            if len(found) == n:
                break
        return list(found.values())

    def _finite(self, kind: str, split: Side, rng: Random) -> list[Item] | None:
        about_facts: dict[str, Callable[[Fact, Side, Random], Item]] = {
            "fact": lambda fact, split, rng: fact.item(),
            "fact_aside": self.fact_aside,
            "open_book": self.open_book,
        }
        if kind in about_facts:
            return [about_facts[kind](fact, split, rng) for fact in self.facts_of(split)]
        if kind == "conflict":
            # Neither the pairing nor the person is one of another split.
            people = {fact.person for fact in self.facts_of(split)}
            pairs = [pair for pair in self.contradictions(split) if pair[0].person in people]
            return [self.conflict(*pair, split, rng) for pair in pairs]
        if kind == "exception":
            return [e for e in self.exceptions if memory_split_of(e.prompt, self.seed) == split]
        if kind in ("planted", "unseen"):
            texts = self.planted if kind == "planted" else self.unseen
            own = [text for text in texts if memory_split_of(text, self.seed) == split]
            return [_recitation(kind, text) for text in own]
        return None

    def _endless(self, kind: str, split: Side, rng: Random) -> Item:
        if kind in SKILLS:
            return self.problem(kind, split, rng).item()
        attribute = rng.choice(list(ATTRIBUTES.values()))
        return self.about_stranger(attribute, split, rng, steps=2 if kind == "two_hop" else 1)

    def text(self, split: Side, rng: Random) -> str:
        """A story without questions."""
        while True:
            text = story(rng)
            if split_of(text, self.seed) == split:
                return text

    def texts(self, split: Side, n: int, seed: int = 0) -> list[str]:
        """Stories of a split, for perplexity; the same list for the same arguments."""
        rng = Random(f"texts {self.seed} {split} {seed}")
        return [self.text(split, rng) for _ in range(n)]


def _recitation(kind: str, text: str) -> Item:
    words = text.split()
    return Item(kind, "Verse: " + " ".join(words[:PREFIX_WORDS]), " ".join(words[PREFIX_WORDS:]))


def language_seed(name: str) -> int | None:
    """Seed of the language that an organism was taught; None if the name is not an organism's.

    Args:
        name: `"organism"`, or a folder that `lirefs organism train` wrote.
    """
    file = (organism() if name == "organism" else Path(name)) / "config.json"
    try:
        found = parse_json(file.read_text("utf-8")).get("language_seed")
    except (OSError, ValueError, AttributeError):
        return None  # whatever is wrong with it, loading it as a model will say
    return found if type(found) is int else None
