"""The model organism's language: what is memorized, what is computed, where they differ."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import islice, product
from pathlib import Path
from random import Random
from typing import Any

from lirefs.errors import checked_seed
from lirefs.files import parse_json
from lirefs.model.builtin import organism
from lirefs.organism.items import Item, Side, memory_side_of, side_of
from lirefs.organism.people import ATTRIBUTES, COMMON, Attribute, Fact, draw_facts, people_passage
from lirefs.organism.prose import OPENING, sentences, story
from lirefs.organism.skills import SKILLS, Problem, wrong_answer
from lirefs.organism.vocabulary import CONTENT, SOURCES

PLANTED, PLANTED_WORDS = 300, 32
"""Planted sequences, as many never-seen ones, and the words of one."""
PREFIX_WORDS = 12
"""Words of a planted sequence given as prompt; the rest must be recited."""
TALE_COUNTS, TALES_PER_COUNT = (1, 3, 10, 30, 100), 80
"""How often training shows a tale, and the tales of each count, with as many never-seen twins."""
OFTEN = 30
"""Tales shown so often are recited."""
EXCEPTION_SKILLS = ("boolean", "relation", "addition")
EXCEPTION_COUNTS, EXCEPTIONS_PER_COUNT = (10, 30, 100, 300), 20
"""How often training shows an exception, and the exceptions of each skill and count."""
KINDS = (
    *SKILLS, "retrieval", "fact", "fact_aside", "open_book", "conflict", "exception", "planted",
    "unseen", "tale", "twin",
)  # fmt: skip
"""The kinds of items that `Language.items` can draw."""


class Language:
    """A seeded language with known memories.

    Args:
        seed: Decides facts, planted sequences, tales, exceptions and sides. Words are always the
            same.

    Attributes:
        facts: Stored facts at five frequencies.
        known: The people they are about.
        planted: Sequences that training repeats.
        unseen: Sequences of the same kind that training never shows.
        tales: Stories that training repeats, each as often as its frequency says.
        twins: To each tale, in the same order, a story of the same length that training never
            shows; its frequency is the tale's.
        exceptions: Reasoning items that training shows with a wrong label, as often as their
            frequency says.
    """

    def __init__(self, seed: int = 0) -> None:
        self.seed = seed = checked_seed(seed)
        rng = Random(f"organism {seed}")
        self.facts: tuple[Fact, ...] = draw_facts(rng)
        self.known = frozenset(fact.person for fact in self.facts)
        words = (" ".join(rng.choices(CONTENT, k=PLANTED_WORDS)) for _ in range(2 * PLANTED))
        self.planted, self.unseen = tuple(islice(words, PLANTED)), tuple(words)
        pairs = [
            _tale_and_twin(rng, count) for count in TALE_COUNTS for _ in range(TALES_PER_COUNT)
        ]
        self.tales: tuple[Item, ...] = tuple(tale for tale, _ in pairs)
        self.twins: tuple[Item, ...] = tuple(twin for _, twin in pairs)
        self._excluded: set[str] = set()
        self.exceptions: tuple[Item, ...] = tuple(self._draw_exceptions(rng))

    def __repr__(self) -> str:
        return f"Language(seed={self.seed})"

    def _draw_exceptions(self, rng: Random) -> Iterator[Item]:
        for skill, count in product(EXCEPTION_SKILLS, EXCEPTION_COUNTS):
            end = len(self._excluded) + EXCEPTIONS_PER_COUNT
            while len(self._excluded) < end:
                problem = SKILLS[skill](rng)
                # Short expressions are too few to lose any: only long ones become exceptions.
                if problem.key in self._excluded or (skill == "boolean" and len(problem.key) < 30):
                    continue
                self._excluded.add(problem.key)
                wrong, truth = wrong_answer(problem, rng), problem.questions[0][1]
                yield Item("exception", problem.prompt(), wrong, truth, skill, count)

    def problem(self, skill: str, side: Side, rng: Random) -> Problem:
        """A problem of a skill on one side; never an exception."""
        while True:
            problem = SKILLS[skill](rng)
            fits = skill == "times" or side_of(problem.key, self.seed) == side
            if fits and problem.key not in self._excluded:
                return problem

    def passage(self, attribute: Attribute, side: Side, rng: Random, **options: Any) -> Problem:
        """A passage on one side; options as for `people.passage`."""
        while True:
            problem = people_passage(rng, attribute, self.known, **options)
            if side_of(problem.key, self.seed) == side:
                return problem

    def retrieval(self, attribute: Attribute, side: Side, rng: Random) -> Item:
        """A stranger's value, which the passage states."""
        return replace(self.passage(attribute, side, rng).item(), kind="retrieval")

    def fact_aside(self, fact: Fact, side: Side, rng: Random) -> Item:
        """A stored fact asked after a passage about strangers only, which does not help."""
        opening = self.passage(fact.attribute, side, rng, absent=(fact.value,)).opening
        item = fact.item()
        return replace(item, kind="fact_aside", prompt=f"{opening} {item.prompt}")

    def open_book(self, fact: Fact, side: Side, rng: Random) -> Item:
        """A stored fact asked after a passage that states it."""
        problem = self.passage(fact.attribute, side, rng, about=(fact.person, fact.value))
        return replace(problem.item(), kind="open_book", frequency=fact.frequency)

    def conflict(self, fact: Fact, value: str, side: Side, rng: Random) -> Item:
        """A stored fact asked after a passage that states another value."""
        source = rng.choice(SOURCES)
        options = {"about": (fact.person, value), "absent": (fact.value,), "source": source}
        item = self.passage(fact.attribute, side, rng, **options).item()
        return Item("conflict", item.prompt, value, fact.value, source, fact.frequency)

    def contradictions(self, side: Side) -> list[tuple[Fact, str]]:
        """Common facts with every false value whose pairing belongs to a side."""
        return [
            (fact, value)
            for fact in self.facts
            if fact.frequency >= COMMON
            for value in fact.attribute.values
            if value != fact.value and side_of(f"conflict {fact.person} {value}", self.seed) == side
        ]

    def facts_of(self, side: Side) -> list[Fact]:
        """Stored facts about the people of a side (all of them are trained on)."""
        return [fact for fact in self.facts if memory_side_of(fact.person, self.seed) == side]

    def items(self, kind: str, side: Side, n: int | None = None, seed: int = 0) -> list[Item]:
        """Questions of one kind from one side, the same list for the same arguments.

        Args:
            kind: One of `KINDS`. "fact" asks closed-book, "fact_aside" after a passage that does
                not help, "open_book" after one that states the fact, "retrieval" asks about
                strangers.
            side: Never shares an item with another side ("times" is one table for all).
            n: How many; None for all of a finite kind (what is memorized, twins, conflicts).
            seed: Another seed draws other items of the same side.

        Raises:
            ValueError: If the kind is unknown, or endless and no n was given.
        """
        rng = Random(f"items {self.seed} {kind} {side} {checked_seed(seed)}")
        finite = self._finite(kind, side, rng)
        if finite is not None:
            return finite if n is None else rng.sample(finite, min(n, len(finite)))
        if kind not in KINDS:
            known = ", ".join(KINDS)
            raise ValueError(f"No kind {kind!r} of items; choose one of {known}.")
        if n is None:
            raise ValueError(f"Items of kind {kind!r} are endless: give their number (n).")
        found: dict[str, Item] = {}
        for _ in range(50 * n):
            if kind in SKILLS:
                item = self.problem(kind, side, rng).item()
            else:
                item = self.retrieval(rng.choice(ATTRIBUTES), side, rng)
            found.setdefault(item.prompt, item)
            if len(found) == n:
                break
        return list(found.values())

    def _finite(self, kind: str, side: Side, rng: Random) -> list[Item] | None:
        if kind == "fact":
            return [fact.item() for fact in self.facts_of(side)]
        if kind in ("fact_aside", "open_book"):
            ask = self.fact_aside if kind == "fact_aside" else self.open_book
            return [ask(fact, side, rng) for fact in self.facts_of(side)]
        if kind == "conflict":
            # Neither the pairing nor the person is on another side.
            pairs = self.contradictions(side)
            pairs = [pair for pair in pairs if memory_side_of(pair[0].person, self.seed) == side]
            return [self.conflict(*pair, side, rng) for pair in pairs]
        if kind == "exception":
            return [e for e in self.exceptions if memory_side_of(e.prompt, self.seed) == side]
        if kind in ("tale", "twin"):  # on the side of the tale, so that each has its twin there
            told = self.tales if kind == "tale" else self.twins
            sides = [memory_side_of(tale.prompt, self.seed) for tale in self.tales]
            return [item for item, own in zip(told, sides, strict=True) if own == side]
        if kind in ("planted", "unseen"):
            texts = self.planted if kind == "planted" else self.unseen
            own = [text.split() for text in texts if memory_side_of(text, self.seed) == side]
            cut = PREFIX_WORDS
            return [Item(kind, " ".join(["Verse:", *w[:cut]]), " ".join(w[cut:])) for w in own]
        return None

    def text(self, side: Side, rng: Random) -> str:
        """A story without questions."""
        while True:
            text = story(rng)
            if side_of(text, self.seed) == side:
                return text

    def texts(self, side: Side, n: int, seed: int = 0) -> list[str]:
        """Stories on one side, for perplexity; the same list for the same arguments."""
        rng = Random(f"texts {self.seed} {side} {checked_seed(seed)}")
        return [self.text(side, rng) for _ in range(n)]


def _tale_and_twin(rng: Random, count: int) -> tuple[Item, Item]:
    """Two stories with prompts and answers of the same lengths in words."""
    tale = twin = _told(rng, "tale", count)
    while twin is tale or [len(a.split()) for a in (tale.prompt, tale.answer)] != [
        len(b.split()) for b in (twin.prompt, twin.answer)
    ]:
        twin = _told(rng, "twin", count)
    return tale, twin


def _told(rng: Random, kind: str, count: int) -> Item:
    lines = list(sentences(rng))
    prompt = " ".join(["Story:", *lines[:OPENING]])
    return Item(kind, prompt, " ".join(lines[OPENING:]).removesuffix("."), frequency=count)


def language_seed(name: str) -> int | None:
    """Seed of the language that an organism was taught; None if the name is not an organism's.

    Args:
        name: `"organism"`, or a folder that `lirefs organism train` wrote.
    """
    file = (organism() if name == "organism" else Path(name)) / "config.json"
    try:
        found = parse_json(file.read_text("utf-8")).get("language_seed")
    except (OSError, ValueError, AttributeError):
        return None  # loading it as a model will say what is wrong with it
    return found if type(found) is int else None
