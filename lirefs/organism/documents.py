"""Training documents: how often each part of the language is shown, and in which words."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from random import Random

from lirefs.organism.items import CONTEXT_WEIGHT, Document, Item, side_of
from lirefs.organism.language import Language
from lirefs.organism.people import ATTRIBUTES, FOLLOWED, Fact
from lirefs.organism.prose import copy_document
from lirefs.organism.skills import Problem, problem_document, relation, tracking
from lirefs.organism.vocabulary import FIRST, LAST, OBJECTS


@dataclass(frozen=True)
class Stage:
    """What training shows during a part of the run.

    Attributes:
        mixture: Relative frequency of each sort of document.
        easy: Share of passages, relations and hand-overs of the smallest size, and of tracking
            with more people than the skill has.
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
    """An endless supply of training documents of the sorts in a stage's mixture.

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
        problem = self.language.passage(attribute, "train", rng, stated=stated, linked=linked)
        questions = tuple(rng.sample(problem.questions, len(problem.questions)))
        return self._told(replace(problem, questions=questions))

    def _again(self, rng: Random) -> Document:
        """Who goes with what, listed and then repeated: the simplest retrieval.

        Sentences are drawn with replacement, so that none follows from the others; some leave out
        words between name and value, which brings the two closer.
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
        """As many linked people as stated ones, questions repeated: many two-step answers."""
        attribute = rng.choice(list(ATTRIBUTES.values()))
        stated = rng.randrange(2, 4)
        problem = self.language.passage(attribute, "train", rng, stated=stated, linked=stated)
        questions = tuple(rng.choices(problem.questions, k=5))
        return self._told(replace(problem, questions=questions))

    def _hands(self, rng: Random) -> Document:
        """Many things given away, some twice, and who has each: tracking without its first line."""
        things = rng.sample(OBJECTS, rng.randrange(2, 6))
        givers = rng.sample(FIRST, len(things))
        holder = dict(zip(things, givers, strict=True))
        lines = []
        for thing in rng.sample(things, len(things)) + rng.choices(things, k=rng.randrange(3)):
            lines.append(_given(rng, thing, holder, FIRST))
        questions = _who_has(rng.choices(things, k=len(things)), holder)
        # Without "has the", so it cannot be a story of the skill itself.
        return self._told(Problem("tracking", "Hands:", " ".join(lines), questions))

    def _ages(self, rng: Random) -> Document:
        """Two or three people, oldest first: an easier form of relations."""
        people = rng.sample(FIRST, rng.choice((2, 3, 3)))
        lines = [f"{a} is older than {b}." for a, b in pairwise(people)]
        if rng.random() < 0.5:
            rng.shuffle(lines)
        ends = (("oldest", people[0]), ("youngest", people[-1]))
        asked = rng.choices(ends, k=2)
        questions = tuple((f"Question: Who is {end}? Answer:", name) for end, name in asked)
        story = " ".join(lines)
        held_out = side_of(story, self.language.seed) != "train"
        if held_out or any(item.prompt.startswith(f"Ages: {story}") for item in self._shown_wrong):
            return self._ages(rng)
        return self._told(Problem("relation", "Ages:", story, questions))

    def _math(self, rng: Random) -> Document:
        kinds = rng.choices(("addition", "subtraction", "times"), (5, 4, 1), k=rng.randrange(1, 7))
        return problem_document([self.language.problem(kind, "train", rng) for kind in kinds])

    def _logic(self, rng: Random) -> Document:
        count = rng.randrange(1, 5)
        problems = [self.language.problem("boolean", "train", rng) for _ in range(count)]
        return problem_document(problems)

    def _relation(self, rng: Random) -> Document:
        easy = self._easy(rng)
        problem = relation(rng, (2,)) if easy else self.language.problem("relation", "train", rng)
        return self._told(problem)

    def _hand_overs(self, rng: Random) -> Document:
        """Who has which of two things after some were given away.

        Asked by the thing it was never learned, so it is not a skill of the language.
        """
        easy = self._easy(rng)
        while True:
            people, things = rng.sample(FIRST, 4), rng.sample(OBJECTS, 2)
            holder = dict(zip(things, people, strict=False))
            lines = [f"{person} has the {thing}." for thing, person in holder.items()]
            for _ in range(rng.choice((0,) if easy else (1, 2, 3))):
                thing = rng.choice(things)
                lines.append(_given(rng, thing, holder, people))
            rng.shuffle(things)
            questions = _who_has(things, holder)
            story = " ".join(lines)
            if easy or side_of(story, self.language.seed) == "train":
                return self._told(Problem("hand-overs", "Hands:", story, questions))

    def _tracking(self, rng: Random) -> Document:
        if self._easy(rng):
            # More people than the skill has.
            return self._told(tracking(rng, rng.choice((4, 5)), (0, 1, 2, 3)))
        return self._told(self.language.problem("tracking", "train", rng))

    def _told(self, problem: Problem) -> Document:
        return problem_document([problem], self.stage.story_weight)

    def _easy(self, rng: Random) -> bool:
        return self.stage.easy > 0 and rng.random() < self.stage.easy

    def _story(self, rng: Random) -> Document:
        return [(self.language.text("train", rng), 1.0)]


def _given(rng: Random, thing: str, holder: dict[str, str], people: Sequence[str]) -> str:
    """Give a thing to another person; the sentence that tells it."""
    giver = holder[thing]
    holder[thing] = rng.choice([one for one in people if one != giver])
    return f"{giver} gives the {thing} to {holder[thing]}."


def _who_has(things: Sequence[str], holder: dict[str, str]) -> tuple[tuple[str, str], ...]:
    return tuple((f"Question: Who has the {thing}? Answer:", holder[thing]) for thing in things)


def _asked(item: Item) -> Document:
    return [(item.prompt, CONTEXT_WEIGHT), (f" {item.answer}.", 1.0)]
