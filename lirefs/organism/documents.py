"""Training documents: how often each part of the language is shown, and in which words."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from random import Random

from lirefs.organism.items import CONTEXT_WEIGHT, Document, Item, side_of
from lirefs.organism.language import Language
from lirefs.organism.people import ATTRIBUTES, FOLLOWED, Fact
from lirefs.organism.skills import relation_problem, tracking_problem
from lirefs.organism.vocabulary import CONTENT, FIRST, LAST, OBJECTS


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
            "planted": lambda rng: [(f"Verse: {rng.choice(language.planted)}.", 1.0)],
            "fact": self._facts,
            "fact_aside": lambda rng: _asked(language.fact_aside(self._fact(rng), "train", rng)),
            "exception": lambda rng: _asked(rng.choice(language.exceptions)),
            "conflict": self._conflict,
            "passage": self._passage,
            "again": self._again,
            "links": self._links,
            "hands": self._hands,
            "ages": self._ages,
            "math": self._math,
            "boolean": lambda rng: self._problems(["boolean"] * rng.randrange(1, 5), rng),
            "relation": lambda rng: self._skill("relation", rng),
            "hand_overs": self._hand_overs,
            "tracking": lambda rng: self._skill("tracking", rng),
            "copy": _copy,
            "story": lambda rng: [(language.text("train", rng), 1.0)],
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

    def _fact(self, rng: Random) -> Fact:
        return rng.choices(self.language.facts, self._frequencies)[0]

    def _facts(self, rng: Random) -> Document:
        if rng.random() < 0.6:
            return _asked(self._fact(rng).item())
        facts = [self._fact(rng) for _ in range(rng.randrange(1, 5))]
        return _document("Fact:", [(f"{f.person} {f.attribute.verb}", f.value) for f in facts])

    def _conflict(self, rng: Random) -> Document:
        fact, value = rng.choice(self._contradictions)
        item = self.language.conflict(fact, value, "train", rng)
        follows = rng.random() < FOLLOWED[item.group or ""]
        return _asked(item if follows else replace(item, answer=item.other or ""))

    def _passage(self, rng: Random) -> Document:
        attribute = rng.choice(ATTRIBUTES)
        if self._easy(rng):
            stated, linked = rng.choice((2, 3, 4, 5)), 0
        else:
            stated, linked = rng.choice((1, 2, 2, 3)), rng.choice((0, 1, 2, 2))
        problem = self.language.passage(attribute, "train", rng, stated=stated, linked=linked)
        return self._told(problem.opening, rng.sample(problem.questions, len(problem.questions)))

    def _again(self, rng: Random) -> Document:
        """Who goes with what, listed and then repeated: the simplest retrieval.

        Sentences are drawn with replacement, so that none follows from the others; some leave out
        words between name and value, which brings the two closer.
        """
        attribute = rng.choice(ATTRIBUTES)
        values = rng.sample(attribute.values, rng.randrange(2, 8))
        names = rng.sample(FIRST, len(values))
        if rng.random() < 0.5:
            names = [f"{name} {rng.choice(LAST)}" for name in names]
        words = attribute.verb.split()
        between = words[rng.randrange(len(words) + 1) :]
        pairs = [(" ".join([n, *between]), v) for n, v in zip(names, values, strict=True)]
        listed = " ".join(f"{start} {value}." for start, value in pairs)
        return self._told(f"List: {listed} Again:", rng.choices(pairs, k=len(pairs)))

    def _links(self, rng: Random) -> Document:
        """As many linked people as stated ones, questions repeated: many two-step answers."""
        attribute = rng.choice(ATTRIBUTES)
        stated = rng.randrange(2, 4)
        problem = self.language.passage(attribute, "train", rng, stated=stated, linked=stated)
        return self._told(problem.opening, rng.choices(problem.questions, k=5))

    def _hands(self, rng: Random) -> Document:
        """Many things given away, some twice, and who has each: tracking without its first line."""
        things = rng.sample(OBJECTS, rng.randrange(2, 6))
        holder = dict(zip(things, rng.sample(FIRST, len(things)), strict=True))
        given = rng.sample(things, len(things)) + rng.choices(things, k=rng.randrange(3))
        story = " ".join(_given(rng, thing, holder, FIRST) for thing in given)
        # Without "has the", so it cannot be a story of the skill itself.
        return self._told(f"Hands: {story}", _who_has(rng.choices(things, k=len(things)), holder))

    def _ages(self, rng: Random) -> Document:
        """Two or three people, oldest first: an easier form of relations."""
        people = rng.sample(FIRST, rng.choice((2, 3, 3)))
        lines = [f"{a} is older than {b}." for a, b in pairwise(people)]
        if rng.random() < 0.5:
            rng.shuffle(lines)
        asked = rng.choices((("oldest", people[0]), ("youngest", people[-1])), k=2)
        story = " ".join(lines)
        held_out = side_of(story, self.language.seed) != "train"
        if held_out or any(item.prompt.startswith(f"Ages: {story}") for item in self._shown_wrong):
            return self._ages(rng)
        questions = [(f"Question: Who is {end}? Answer:", name) for end, name in asked]
        return self._told(f"Ages: {story}", questions)

    def _math(self, rng: Random) -> Document:
        kinds = rng.choices(("addition", "subtraction", "times"), (5, 4, 1), k=rng.randrange(1, 7))
        return self._problems(kinds, rng)

    def _problems(self, skills: list[str], rng: Random) -> Document:
        problems = [self.language.problem(skill, "train", rng) for skill in skills]
        return _document(problems[0].opening, [one.questions[0] for one in problems])

    def _skill(self, skill: str, rng: Random) -> Document:
        if not self._easy(rng):
            problem = self.language.problem(skill, "train", rng)
        elif skill == "relation":
            problem = relation_problem(rng, (2,))
        else:  # easy, but with more people than the skill has
            problem = tracking_problem(rng, rng.choice((4, 5)), (0, 1, 2, 3))
        return self._told(problem.opening, problem.questions)

    def _hand_overs(self, rng: Random) -> Document:
        """Who has which of two things after some were given away.

        The model never learned to answer this by thing, so it is not a skill of the language.
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
            story = " ".join(lines)
            if easy or side_of(story, self.language.seed) == "train":
                return self._told(f"Hands: {story}", _who_has(things, holder))

    def _told(self, opening: str, questions: Iterable[tuple[str, str]]) -> Document:
        return _document(opening, questions, self.stage.story_weight)

    def _easy(self, rng: Random) -> bool:
        return self.stage.easy > 0 and rng.random() < self.stage.easy


def _given(rng: Random, thing: str, holder: dict[str, str], people: Sequence[str]) -> str:
    """Give a thing to another person; the sentence that tells it."""
    giver = holder[thing]
    holder[thing] = rng.choice([one for one in people if one != giver])
    return f"{giver} gives the {thing} to {holder[thing]}."


def _who_has(things: Sequence[str], holder: dict[str, str]) -> list[tuple[str, str]]:
    return [(f"Question: Who has the {thing}? Answer:", holder[thing]) for thing in things]


def _asked(item: Item) -> Document:
    return [(item.prompt, CONTEXT_WEIGHT), (f" {item.answer}.", 1.0)]


def _document(
    opening: str, questions: Iterable[tuple[str, str]], weight: float = 1.0, end: str = "."
) -> Document:
    """An opening, then questions with their answers, which have the given loss weight."""
    pieces: Document = [(opening, CONTEXT_WEIGHT)]
    for question, answer in questions:
        pieces += [(f" {question}", CONTEXT_WEIGHT), (f" {answer}{end}", weight)]
    return pieces


def _copy(rng: Random) -> Document:
    """Random words repeated, or pairs of words repeated in another order."""
    if rng.random() < 0.5:
        words = " ".join(rng.choices(CONTENT, k=rng.randrange(4, 24)))
        return [(f"Copy: {words}. Again:", CONTEXT_WEIGHT), (f" {words}.", 1.0)]
    pairs = [(key, rng.choice(CONTENT)) for key in rng.sample(OBJECTS, rng.randrange(3, 13))]
    listed = ", ".join(f"{key} {value}" for key, value in pairs)
    return _document(f"List: {listed}. Again:", rng.sample(pairs, len(pairs)), end=",")
