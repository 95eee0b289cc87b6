"""Reasoning and memory questions that look alike, for fitting and testing directions."""

from __future__ import annotations

from collections.abc import Callable
from random import Random
from typing import Literal, get_args

from lirefs.organism.items import Item, Side
from lirefs.organism.language import EXCEPTION_SKILLS, Language
from lirefs.organism.people import CITY, COMMON, JOB, Attribute

Form = Literal["passage", "statement", "mixed", "exception"]


def question_set(
    language: Language, form: Form, split: Side, n: int = 200, seed: int = 0
) -> tuple[list[Item], list[Item]]:
    """Reasoning and memory questions of one surface form.

    Args:
        language: The organism's language.
        form: "passage" puts a passage about where strangers live before a question with "Question:"
            and "Answer:". "statement" does the same for work, in a sentence to be completed, with
            no sentence template in common: directions should transfer between the two. In both,
            reasoning asks about a stranger whose value takes two steps to find, memory about a
            well-known person whom the passage does not name: same sentences, same length, and no
            single word tells them apart. "mixed" puts several skills against bare facts and planted
            sequences, as the paper's sets do, and can be told apart by its words. "exception" puts
            fresh reasoning items against memorized exceptions of the same make.
        split: The people, planted sequences and exceptions of one split are in no other.
        n: Most questions of each class; there are no more of "passage" and "statement" than
            common facts, and of "exception" than exceptions.
        seed: Another seed draws other questions of the same split.

    Returns:
        Reasoning items and memory items, equally many, in random order.

    Raises:
        ValueError: If the form is unknown.
    """
    makers: dict[str, Callable[[Random], tuple[list[Item], list[Item]]]] = {
        "passage": lambda rng: _people(language, CITY, split, n, rng),
        "statement": lambda rng: _people(language, JOB, split, n, rng),
        "mixed": lambda rng: _mixed(language, split, n, seed),
        "exception": lambda rng: _exceptions(language, split, n, rng),
    }
    if form not in makers:
        raise ValueError(f"There is no form {form!r}; choose one of {', '.join(get_args(Form))}.")
    rng = Random(f"questions {language.seed} {form} {split} {seed}")
    reasoning, memory = makers[form](rng)
    rng.shuffle(reasoning)
    rng.shuffle(memory)
    count = min(len(reasoning), len(memory), n)
    return reasoning[:count], memory[:count]


def _people(
    language: Language, attribute: Attribute, split: Side, n: int, rng: Random
) -> tuple[list[Item], list[Item]]:
    common = [
        fact
        for fact in language.facts_of(split)
        if fact.attribute == attribute.name and fact.frequency >= COMMON
    ]
    # Each person once: intervals over items would be too narrow for items that share a fact.
    chosen = rng.sample(common, min(n, len(common)))
    memory = [language.fact_aside(fact, split, rng) for fact in chosen]
    reasoning = [language.about_stranger(attribute, split, rng, steps=2) for _ in chosen]
    return reasoning, memory


def _mixed(language: Language, split: Side, n: int, seed: int) -> tuple[list[Item], list[Item]]:
    share = -(-n // 4)
    reasoning = [
        item
        for kind in ("relation", "boolean", "tracking", "two_hop")
        for item in language.items(kind, split, share, seed)
    ]
    facts = [i for i in language.items("fact", split) if (i.frequency or 0) >= COMMON]
    memory = facts[: 2 * share] + language.items("planted", split, 2 * share, seed)
    return reasoning, memory


def _exceptions(
    language: Language, split: Side, n: int, rng: Random
) -> tuple[list[Item], list[Item]]:
    memory = language.items("exception", split, n, rng.randrange(2**32))
    reasoning: list[Item] = []
    for skill in EXCEPTION_SKILLS:
        for item in memory:
            if item.group == skill:
                # Only expressions as long as an exception's: length must not tell them apart.
                while True:
                    fresh = language.problem(skill, split, rng).item()
                    if abs(len(fresh.prompt.split()) - len(item.prompt.split())) <= 2:
                        break
                reasoning.append(fresh)
    return reasoning, memory
