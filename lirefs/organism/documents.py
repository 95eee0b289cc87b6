"""Training documents: how often each part of the language is shown, and in which words."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import pairwise
from random import Random

from lirefs.organism.items import CONTEXT_WEIGHT, Document, Item, split_of
from lirefs.organism.language import Language
from lirefs.organism.people import ATTRIBUTES, FOLLOWED, Fact
from lirefs.organism.prose import copy_document
from lirefs.organism.skills import Problem, problem_document, relation, tracking
from lirefs.organism.vocabulary import FIRST, LAST, OBJECTS


@dataclass(frozen=True)
class Stage:
    """What training shows during a part of the run.

    Attributes:
        mixture: How often each sort of document is drawn, relative to each other.
        easy: Share of passages, relations and hand-overs that are of the smallest kind, and of
            tracking with more people than the skill has.
        story_weight: Loss weight of answers that are found in a story; other answers have 1.
        rate: Learning rate.
        fall: Final share of the stage over which the rate falls linearly to zero.
    """

    mixture: dict[str, float]
    easy: float = 0.0
    story_weight: float = 1.0
    rate: float = 3e-3
    fall: float = 0.0


class Documents:
    """Training documents, drawn one by one without end.

    Args:
        language: What is taught.
        stage: What is shown; its mixture's keys are those of `Documents.sorts`.

    Raises:
        ValueError: If the mixture names a sort that does not exist.
    """

    def __init__(self, language: Language, stage: Stage) -> None:
        self.language, self.stage = language, stage
        self.sorts: dict[str, Callable[[Random], Document]] = {
            "planted": self._planted,
            "fact": self._facts,
            "fact_aside": self._fact_aside,
            "exception": self._exception,
            "conflict": self._conflict,
            "passage": self._passage,
            "again": self._again,
            "links": self._links,
            "hands": self._hands,
            "ages": self._ages,
            "math": self._math,
            "boolean": self._logic,
            "relation": self._relation,
            "hand_overs": self._hand_overs,
            "tracking": self._tracking,
            "copy": copy_document,
            "story": self._story,
        }
        unknown = set(stage.mixture) - set(self.sorts)
        if unknown:
            raise ValueError(f"No documents of sort {unknown}; known: {', '.join(self.sorts)}.")
        self._names, self._weights = list(stage.mixture), list(stage.mixture.values())
        self._frequencies = [fact.frequency for fact in language.facts]
        self._shown_wrong = [one for one in language.exceptions if one.group == "relation"]
        self._contradictions = language.contradictions("train")

    def draw(self, rng: Random) -> Document:
        """One document."""
        return self.sorts[rng.choices(self._names, self._weights)[0]](rng)

    def _planted(self, rng: Random) -> Document:
        return [(f"Verse: {rng.choice(self.language.planted)}.", 1.0)]

    def _fact(self, rng: Random) -> Fact:
        return rng.choices(self.language.facts, self._frequencies)[0]

    def _facts(self, rng: Random) -> Document:
        if rng.random() < 0.6:
            return _asked(self._fact(rng).item())
        pieces: Document = [("Fact:", CONTEXT_WEIGHT)]
        for _ in range(rng.randrange(1, 5)):
            fact = self._fact(rng)
            start, end = fact.statement.rsplit(" ", 1)
            pieces += [(f" {start}", CONTEXT_WEIGHT), (f" {end}", 1.0)]
        return pieces

    def _fact_aside(self, rng: Random) -> Document:
        return _asked(self.language.fact_aside(self._fact(rng), "train", rng))

    def _exception(self, rng: Random) -> Document:
        return _asked(rng.choice(self.language.exceptions))

    def _conflict(self, rng: Random) -> Document:
        fact, value = rng.choice(self._contradictions)
        item = self.language.conflict(fact, value, "train", rng)
        follows = rng.random() < FOLLOWED[item.group or ""]
        return _asked(item if follows else replace(item, answer=item.other or ""))

    def _passage(self, rng: Random) -> Document:
        attribute = rng.choice(list(ATTRIBUTES.values()))
        if self._easy(rng):
            stated, linked = rng.choice((2, 3, 4, 5)), 0
        else:
            stated, linked = rng.choice((1, 2, 2, 3)), rng.choice((0, 1, 2, 2))
        problem = self.language.passage(attribute, "train", rng, stated, linked)
        questions = tuple(rng.sample(problem.questions, len(problem.questions)))
        return self._told(replace(problem, questions=questions))

    def _again(self, rng: Random) -> Document:
        """Who goes with what, listed and then said again: retrieval at its plainest.

        Sentences are drawn anew each time, so that none can be told from what is left over; some
        leave out words between name and value, which brings the two closer.
        """
        attribute = rng.choice(list(ATTRIBUTES.values()))
        values = rng.sample(attribute.values, rng.randrange(2, 8))
        names = rng.sample(FIRST, len(values))
        if rng.random() < 0.5:
            names = [f"{name} {rng.choice(LAST)}" for name in names]
        words = attribute.sentence.removesuffix(".").split()[1:-1]
        between = words[rng.randrange(len(words) + 1) :]
        starts = [" ".join([name, *between]) for name in names]
        pairs = list(zip(starts, values, strict=True))
        listed = " ".join(f"{start} {value}." for start, value in pairs)
        pieces: Document = [(f"List: {listed} Again:", CONTEXT_WEIGHT)]
        for start, value in rng.choices(pairs, k=len(pairs)):
            pieces += [(f" {start}", CONTEXT_WEIGHT), (f" {value}.", self.stage.story_weight)]
        return pieces

    def _links(self, rng: Random) -> Document:
        """As many linked people as stated ones, each question drawn anew: two steps, densely."""
        attribute = rng.choice(list(ATTRIBUTES.values()))
        stated = rng.randrange(2, 4)
        problem = self.language.passage(attribute, "train", rng, stated, stated)
        questions = tuple(rng.choices(problem.questions, k=5))
        return self._told(replace(problem, questions=questions))

    def _hands(self, rng: Random) -> Document:
        """Many things given away, some twice, and who has each: tracking without its first line."""
        things = rng.sample(OBJECTS, rng.randrange(2, 6))
        givers = rng.sample(FIRST, len(things))
        holder = dict(zip(things, givers, strict=True))
        lines = []
        for thing in rng.sample(things, len(things)) + rng.choices(things, k=rng.randrange(3)):
            receiver = rng.choice([name for name in FIRST if name != holder[thing]])
            lines.append(f"{holder[thing]} gives the {thing} to {receiver}.")
            holder[thing] = receiver
        asked = rng.choices(things, k=len(things))
        questions = tuple((f"Question: Who has the {t}? Answer:", holder[t]) for t in asked)
        story = " ".join(lines)  # without "has the", so it is no story of the skill itself
        problem = Problem("tracking", "Hands:", story, questions, story)
        return self._told(problem)

    def _ages(self, rng: Random) -> Document:
        """Two or three people from the oldest down: order before it is shuffled and turned."""
        people = rng.sample(FIRST, rng.choice((2, 3, 3)))
        lines = [f"{a} is older than {b}." for a, b in pairwise(people)]
        if rng.random() < 0.5:
            rng.shuffle(lines)
        ends = (("oldest", people[0]), ("youngest", people[-1]))
        questions = tuple(
            (f"Question: Who is {end}? Answer:", name) for end, name in rng.choices(ends, k=2)
        )
        story = " ".join(lines)
        held_out = split_of(story, self.language.seed) != "train"
        if held_out or any(item.prompt.startswith(f"Ages: {story}") for item in self._shown_wrong):
            return self._ages(rng)
        problem = Problem("relation", "Ages:", story, questions, story)
        return self._told(problem)

    def _math(self, rng: Random) -> Document:
        kinds = rng.choices(("addition", "subtraction", "times"), (5, 4, 1), k=rng.randrange(1, 7))
        return problem_document([self.language.problem(kind, "train", rng) for kind in kinds])

    def _logic(self, rng: Random) -> Document:
        count = rng.randrange(1, 5)
        return problem_document(
            [self.language.problem("boolean", "train", rng) for _ in range(count)]
        )

    def _relation(self, rng: Random) -> Document:
        easy = self._easy(rng)
        problem = relation(rng, (2,)) if easy else self.language.problem("relation", "train", rng)
        return self._told(problem)

    def _hand_overs(self, rng: Random) -> Document:
        """Who has which of two things after some were given away.

        Asked by the thing it was never learned, so it is no skill of the language.
        """
        easy = self._easy(rng)
        while True:
            people, things = rng.sample(FIRST, 4), rng.sample(OBJECTS, 2)
            holder = dict(zip(things, people, strict=False))
            lines = [f"{person} has the {thing}." for thing, person in holder.items()]
            for _ in range(rng.choice((0,) if easy else (1, 2, 3))):
                thing = rng.choice(things)
                receiver = rng.choice([one for one in people if one != holder[thing]])
                lines.append(f"{holder[thing]} gives the {thing} to {receiver}.")
                holder[thing] = receiver
            rng.shuffle(things)
            questions = tuple((f"Question: Who has the {t}? Answer:", holder[t]) for t in things)
            story = " ".join(lines)
            if easy or split_of(story, self.language.seed) == "train":
                problem = Problem("hand-overs", "Hands:", story, questions, story)
                return self._told(problem)

    def _tracking(self, rng: Random) -> Document:
        if self._easy(rng):
            # More people than the skill has, and most of them asked about.
            problem = tracking(rng, rng.choice((4, 5)), (0, 1, 2, 3))
        else:
            problem = self.language.problem("tracking", "train", rng)
        return self._told(problem)

    def _told(self, problem: Problem) -> Document:
        return problem_document([problem], self.stage.story_weight)

    def _easy(self, rng: Random) -> bool:
        return self.stage.easy > 0 and rng.random() < self.stage.easy

    def _story(self, rng: Random) -> Document:
        return [(self.language.text("train", rng), 1.0)]


def _asked(item: Item) -> Document:
    return [(item.prompt, CONTEXT_WEIGHT), (f" {item.answer}.", 1.0)]
