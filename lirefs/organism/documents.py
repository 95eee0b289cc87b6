"""Training documents: how often each part of the language is shown, and in which words."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from random import Random

from .items import CONTEXT_WEIGHT, Document
from .language import Language
from .people import ATTRIBUTES, FOLLOWED, Attribute, Fact
from .prose import copy_document
from .skills import Problem, problem_document

Mixture = dict[str, float]
"""Documents drawn of each sort, relative to each other."""


class Documents:
    """An endless stream of training documents.

    Args:
        language: What is taught.
        mixture: How often each sort of document is drawn (keys of `Documents.sorts`).
    """

    def __init__(self, language: Language, mixture: Mixture) -> None:
        self.language = language
        self.sorts: dict[str, Callable[[Random], Document]] = {
            "planted": self._planted,
            "fact": self._facts,
            "fact_aside": self._fact_aside,
            "exception": self._exception,
            "conflict": self._conflict,
            "passage": self._passage,
            "math": self._math,
            "boolean": self._logic,
            "relation": lambda rng: self._one("relation", rng),
            "tracking": lambda rng: self._one("tracking", rng),
            "copy": copy_document,
            "story": self._story,
        }
        unknown = set(mixture) - set(self.sorts)
        if unknown:
            raise ValueError(f"No documents of sort {unknown}; known: {', '.join(self.sorts)}.")
        self._names, self._weights = list(mixture), list(mixture.values())
        self._frequencies = [fact.frequency for fact in language.facts]
        self._contradictions = language.contradictions("train")

    def draw(self, rng: Random) -> Document:
        """One document."""
        return self.sorts[rng.choices(self._names, self._weights)[0]](rng)

    def stream(self, rng: Random) -> Iterator[Document]:
        """Documents without end."""
        while True:
            yield self.draw(rng)

    def _planted(self, rng: Random) -> Document:
        return [(f"Verse: {rng.choice(self.language.planted)}.", 1.0)]

    def _fact(self, rng: Random) -> Fact:
        return rng.choices(self.language.facts, self._frequencies)[0]

    def _facts(self, rng: Random) -> Document:
        if rng.random() < 0.6:
            item = self._fact(rng).item()
            return [(item.prompt, CONTEXT_WEIGHT), (f" {item.answer}.", 1.0)]
        pieces: Document = [("Fact:", CONTEXT_WEIGHT)]
        for _ in range(rng.randrange(1, 5)):
            fact = self._fact(rng)
            start, end = fact.statement.rsplit(" ", 1)
            pieces += [(f" {start}", CONTEXT_WEIGHT), (f" {end}", 1.0)]
        return pieces

    def _fact_aside(self, rng: Random) -> Document:
        item = self.language.fact_aside(self._fact(rng), "train", rng)
        return [(item.prompt, CONTEXT_WEIGHT), (f" {item.answer}.", 1.0)]

    def _exception(self, rng: Random) -> Document:
        item = rng.choice(self.language.exceptions)
        return [(item.prompt, CONTEXT_WEIGHT), (f" {item.answer}.", 1.0)]

    def _conflict(self, rng: Random) -> Document:
        fact, value = rng.choice(self._contradictions)
        item = self.language.conflict(fact, value, "train", rng)
        follows = rng.random() < FOLLOWED[item.group or ""]
        answer = item.answer if follows else item.other
        return [(item.prompt, CONTEXT_WEIGHT), (f" {answer}.", 1.0)]

    def _passage(self, rng: Random) -> Document:
        attribute: Attribute = rng.choice(list(ATTRIBUTES.values()))
        stated = rng.choice((1, 2, 2, 3))
        linked = rng.choice((0, 1, 2, 2))
        problem = self.language.passage(attribute, "train", rng, stated, linked)
        return _asked(problem, rng)

    def _math(self, rng: Random) -> Document:
        kinds = rng.choices(("addition", "subtraction", "times"), (5, 4, 1), k=rng.randrange(1, 7))
        return problem_document([self.language.problem(kind, "train", rng) for kind in kinds])

    def _logic(self, rng: Random) -> Document:
        count = rng.randrange(1, 5)
        return problem_document(
            [self.language.problem("boolean", "train", rng) for _ in range(count)]
        )

    def _one(self, skill: str, rng: Random) -> Document:
        return problem_document([self.language.problem(skill, "train", rng)])

    def _story(self, rng: Random) -> Document:
        return [(self.language.text("train", rng), 1.0)]


def _asked(problem: Problem, rng: Random) -> Document:
    """A passage with all its questions, in random order."""
    questions = tuple(rng.sample(problem.questions, len(problem.questions)))
    return problem_document([replace(problem, questions=questions)])
