"""Reasoning and memory questions that look alike, for fitting and testing directions."""

from __future__ import annotations

from random import Random
from typing import Literal, get_args

from lirefs.errors import checked_seed
from lirefs.organism.items import Item, Side
from lirefs.organism.language import EXCEPTION_SKILLS, OFTEN, Language
from lirefs.organism.people import CITY, COMMON, JOB, Attribute

Form = Literal["passage", "statement", "mixed", "exception"]
LABELS = ("reasoning", "memory")
"""The classes of a question set."""


def question_set(
    language: Language, form: Form, side: Side, n: int = 200, seed: int = 0
) -> tuple[list[Item], list[Item]]:
    """Reasoning items and memory items of one form, at most n of each, equally many, shuffled.

    "passage" puts a passage about where strangers live before a question; "statement" does the same
    for work, in a sentence to be completed, with no sentence template in common: directions should
    transfer between the two. In both, reasoning asks about a stranger whose value the passage
    states, memory about a well-known person whom the passage does not name: same sentences, same
    length, and no single word distinguishes them. "mixed" contrasts several skills with bare facts,
    planted sequences and tales, as the paper's sets do; its words give the class away. "exception"
    contrasts fresh reasoning items with memorized exceptions of the same kind.

    Raises:
        ValueError: If the form is unknown.
    """
    seed = checked_seed(seed)
    rng = Random(f"questions {language.seed} {form} {side} {seed}")
    if form in ("passage", "statement"):
        reasoning, memory = _people(language, CITY if form == "passage" else JOB, side, n, rng)
    elif form == "mixed":
        reasoning, memory = _mixed(language, side, n, seed)
    elif form == "exception":
        reasoning, memory = _exceptions(language, side, n, rng)
    else:
        raise ValueError(f"No form {form!r}; choose one of {', '.join(get_args(Form))}.")
    rng.shuffle(reasoning)
    rng.shuffle(memory)
    count = min(len(reasoning), len(memory), n)
    return reasoning[:count], memory[:count]


def _people(
    language: Language, attribute: Attribute, side: Side, n: int, rng: Random
) -> tuple[list[Item], list[Item]]:
    facts = [fact for fact in language.facts_of(side) if fact.attribute == attribute]
    common = [fact for fact in facts if fact.frequency >= COMMON]
    # Each person once: intervals over items would be too narrow for items that share a fact.
    chosen = rng.sample(common, min(n, len(common)))
    memory = [language.fact_aside(fact, side, rng) for fact in chosen]
    reasoning = [language.retrieval(attribute, side, rng) for _ in chosen]
    return reasoning, memory


def _mixed(language: Language, side: Side, n: int, seed: int) -> tuple[list[Item], list[Item]]:
    share = -(-n // 4)
    reasoning = [
        item
        for kind in ("relation", "boolean", "addition", "retrieval")
        for item in language.items(kind, side, share, seed)
    ]
    facts = [i for i in language.items("fact", side) if (i.frequency or 0) >= COMMON]
    tales = language.items("tale", side, len(language.tales), seed)
    recited = [i for i in tales if (i.frequency or 0) >= OFTEN][:share]
    planted = language.items("planted", side, share, seed)
    return reasoning, [*facts[: 2 * share], *planted, *recited]


def _exceptions(
    language: Language, side: Side, n: int, rng: Random
) -> tuple[list[Item], list[Item]]:
    memory = language.items("exception", side, n, rng.randrange(2**32))
    reasoning: list[Item] = []
    for skill in EXCEPTION_SKILLS:
        for length in [len(item.prompt.split()) for item in memory if item.group == skill]:
            # Only expressions as long as an exception's: length must not give the class away.
            fresh = language.problem(skill, side, rng).item()
            while abs(len(fresh.prompt.split()) - length) > 2:
                fresh = language.problem(skill, side, rng).item()
            reasoning.append(fresh)
    return reasoning, memory
