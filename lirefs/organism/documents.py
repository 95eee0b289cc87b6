"""Training documents: how often each part of the language is shown, and in which words."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from itertools import pairwise
from random import Random

from lirefs.organism.items import CONTEXT_WEIGHT, Document, Item, side_of
from lirefs.organism.language import Language
from lirefs.organism.people import ATTRIBUTES, FOLLOWED, Fact
from lirefs.organism.skills import relation_problem, tracking_problem
from lirefs.organism.vocabulary import CITIES, CONTENT, FIRST, LAST

NOUNS = (*CONTENT, *FIRST, *LAST, *CITIES)
"""Words that are copied."""

STORY_WEIGHT = 3.0
"""Loss weight of answers that are found in a story; other answers have 1."""
RECITED_WEIGHT = 5.0
"""Loss weight of the part of a tale that is to be recited, so that 30 showings are enough."""
EASY = 0.2
"""Share of relations of the smallest size, and of tracking with more people than the skill has."""


class Documents:
    """An endless supply of training documents.

    Args:
        language: What they are about.
        mixture: Relative frequency of each sort of document.

    Raises:
        ValueError: If the mixture names a sort that does not exist.
    """

    def __init__(self, language: Language, mixture: Mapping[str, float]) -> None:
        self.language = language
        self.sorts: dict[str, Callable[[Random], Document]] = {
            "planted": lambda rng: [(f"Verse: {rng.choice(language.planted)}.", 1.0)],
            "tale": lambda rng: counted_document(_by_frequency(language.tales, rng)),
            "exception": lambda rng: counted_document(_by_frequency(language.exceptions, rng)),
            "fact": self._facts,
            "fact_aside": lambda rng: _asked(language.fact_aside(self._fact(rng), "train", rng)),
            "conflict": self._conflict,
            "passage": self._passage,
            "again": self._again,
            "ages": self._ages,
            "math": self._math,
            "boolean": lambda rng: self._problems(["boolean"] * rng.randrange(1, 5), rng),
            "relation": lambda rng: self._skill("relation", rng),
            "tracking": lambda rng: self._skill("tracking", rng),
            "copy": _copy,
            "story": lambda rng: [(language.text("train", rng), 1.0)],
        }
        unknown = set(mixture) - set(self.sorts)
        if unknown:
            raise ValueError(f"No documents of sort {unknown}; known: {', '.join(self.sorts)}.")
        self._names, self._weights = list(mixture), list(mixture.values())
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
        attribute, stated = rng.choice(ATTRIBUTES), rng.choice((1, 2, 3, 3, 4, 5))
        problem = self.language.passage(attribute, "train", rng, stated=stated)
        return _told(problem.opening, rng.sample(problem.questions, stated))

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
        return _told(f"List: {listed} Again:", rng.choices(pairs, k=len(pairs)))

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
        return _told(f"Ages: {story}", questions)

    def _math(self, rng: Random) -> Document:
        kinds = rng.choices(("addition", "subtraction", "times"), (5, 4, 1), k=rng.randrange(1, 7))
        return self._problems(kinds, rng)

    def _problems(self, skills: list[str], rng: Random) -> Document:
        problems = [self.language.problem(skill, "train", rng) for skill in skills]
        return _document(problems[0].opening, [one.questions[0] for one in problems])

    def _skill(self, skill: str, rng: Random) -> Document:
        if rng.random() > EASY:
            problem = self.language.problem(skill, "train", rng)
        elif skill == "relation":
            problem = relation_problem(rng, (2,))
        else:  # easy, but with more people than the skill has
            problem = tracking_problem(rng, rng.choice((4, 5)), (0, 1, 2, 3))
        return _told(problem.opening, problem.questions)


def counted_document(item: Item) -> Document:
    """The document that shows a tale or an exception."""
    if item.kind == "tale":
        return [(item.prompt, 1.0), (f" {item.answer}.", RECITED_WEIGHT)]
    return _asked(item)


def showings(language: Language, steps: range) -> dict[int, list[Document]]:
    """The steps at which tales and exceptions are shown, each exactly as often as its frequency.

    The steps are cut into as many equal parts as there are showings of an item, and it is shown at
    a random step of each. No steps, no showings.
    """
    rng = Random(f"showings {language.seed}")
    due: dict[int, list[Document]] = defaultdict(list)
    for item in (*language.tales, *language.exceptions) if steps else ():
        count = item.frequency or 0
        for part in range(count):
            step = steps[int((part + rng.random()) / count * len(steps))]
            due[step].append(counted_document(item))
    return due


def _by_frequency(items: tuple[Item, ...], rng: Random) -> Item:
    return rng.choices(items, [item.frequency or 0 for item in items])[0]


def _told(opening: str, questions: Iterable[tuple[str, str]]) -> Document:
    return _document(opening, questions, STORY_WEIGHT)


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
        words = " ".join(rng.choices(NOUNS, k=rng.randrange(4, 24)))
        return [(f"Copy: {words}. Again:", CONTEXT_WEIGHT), (f" {words}.", 1.0)]
    pairs = [(key, rng.choice(NOUNS)) for key in rng.sample(NOUNS, rng.randrange(3, 13))]
    listed = ", ".join(f"{key} {value}" for key, value in pairs)
    return _document(f"List: {listed}. Again:", rng.sample(pairs, len(pairs)), end=",")
