"""Two meanings of memorization, item by item, and which of them an edit removes.

An item can be called memorized because a small change of its prompt breaks it (perturbation), or
because the model does better on it than if it had never been trained on it (counterfactual: Zhang
et al. 2023, arXiv 2112.12938). Hong et al. 2025 leave open whether the two are the same.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from random import Random

import numpy as np

import kfac
import lirefs
from lirefs import Intervention, LanguageModel
from lirefs.errors import TaskError
from lirefs.model import applied
from lirefs.organism import Item, Language, training_texts
from lirefs.organism.items import Side
from lirefs.organism.people import ATTRIBUTES, stranger
from lirefs.organism.skills import wrong_answer
from lirefs.statistics import Estimate, correlation
from lirefs.statistics.intervals import Floats
from lirefs.tasks import token_nlls

POSITIONS = 4
"""Number of prompts with one replaced token that the perturbation score averages over."""
NEVER_SHOWN = {"tale": "twin", "planted": "unseen"}
"""Kinds of memorized texts, and the kind of never-seen ones."""
SCORES = ("perturbation", "counterfactual", "fall under the edit")


@dataclass(frozen=True, eq=False)
class MemorizationScores:
    """Scores of the items of one kind, in nats per token of the answer.

    Attributes:
        kind: Kind of the items.
        perturbation: Drop in the answer's log-probability when one token of the prompt is replaced
            at random, mean over `POSITIONS` draws, shape (n,).
        counterfactual: Log-probability of the answer minus its mean over never-seen items of the
            same group, shape (n,). No item is actually left out of training: items of a group are
            exchangeable with its never-seen ones, so the mean over these estimates the
            log-probability without training. It is one number per group, so within a group the
            score orders items by their log-probability alone.
        fall: Drop in the answer's log-probability under an edit, shape (n,).
        correlations: Spearman correlation of each pair of `SCORES`.
    """

    kind: str
    perturbation: Floats
    counterfactual: Floats
    fall: Floats
    correlations: dict[tuple[str, str], Estimate]


def memorization_scores(
    lm: LanguageModel,
    edit: Intervention,
    items: Sequence[Item],
    unseen: Sequence[Item],
    *,
    seed: int = 0,
) -> MemorizationScores:
    """Score items of one kind by both meanings, and by how much an edit removes.

    Args:
        lm: The organism, unedited.
        edit: The edit.
        items: Items of one kind that training showed.
        unseen: Never-seen items of the same kind; those of an item's `group` are its reference.
        seed: Seed of the replaced tokens.

    Raises:
        TaskError: If no token of the prompts can be replaced, or a group has no never-seen item.
    """
    rng = Random(f"perturbation {seed}")
    own = [_ids(lm, item) for item in items]
    tokens = sorted({token for prompt, _ in own for token in prompt[1:]})
    if len(tokens) < 2 or any(len(prompt) < 2 for prompt, _ in own):
        raise TaskError(
            "no token can be replaced: prompts need at least two tokens, not all of them the same"
        )
    before = _log_probabilities(lm, own)
    perturbed = [one for each in own for one in _perturbed(each, tokens, rng)]
    lower = _log_probabilities(lm, perturbed).reshape(len(own), POSITIONS).mean(axis=1)
    never = _log_probabilities(lm, [_ids(lm, item) for item in unseen])
    groups = [item.group for item in unseen]
    reference = {
        group: float(never[[one == group for one in groups]].mean()) for group in set(groups)
    }
    missing = {item.group for item in items} - set(reference)
    if missing:
        raise TaskError(f"no never-seen items of group {missing.pop()!r} to compare with")
    with applied(edit, lm.model):
        after = _log_probabilities(lm, own)
    scores = {
        "perturbation": before - lower,
        "counterfactual": before - np.array([reference[item.group] for item in items]),
        "fall under the edit": before - after,
    }
    return MemorizationScores(
        kind=items[0].kind,
        perturbation=scores["perturbation"],
        counterfactual=scores["counterfactual"],
        fall=scores["fall under the edit"],
        correlations={
            (one, other): correlation(scores[one], scores[other], ranks=True)
            for one, other in itertools.combinations(SCORES, 2)
        },
    )


def never_seen(language: Language, kind: str, split: Side, n: int, seed: int = 0) -> list[Item]:
    """Items like memorized ones that training never showed.

    Args:
        language: The organism's language.
        kind: `tale` (their twins), `planted` (other random sequences), `fact` (people that no fact
            is about, with a value drawn in the same way) or `exception` (fresh items with a wrong
            label).
        split: Split of the fresh items.
        n: Number of items; for exceptions, per skill.
        seed: Seed of the draws.

    Raises:
        ValueError: If the kind is unknown.
    """
    rng = Random(f"never seen {language.seed} {kind} {split} {seed}")
    if kind in NEVER_SHOWN:
        return language.items(NEVER_SHOWN[kind], split, n)
    if kind == "fact":
        found = []
        for _ in range(n):
            attribute = rng.choice(ATTRIBUTES)
            question = attribute.question.format(stranger(rng, language.known))
            found.append(Item("fact", question, rng.choice(attribute.values)))
        return found
    if kind == "exception":
        skills = sorted({item.group for item in language.exceptions if item.group})
        problems = [language.problem(skill, split, rng) for skill in skills for _ in range(n)]
        return [
            Item("exception", one.prompt(), wrong_answer(one, rng), group=one.kind)
            for one in problems
        ]
    raise ValueError(
        f"no items of kind {kind!r} are memorized; use tale, planted, fact or exception"
    )


def memorized(language: Language, kind: str, split: Side, n: int | None = None) -> list[Item]:
    """Items that training showed, with groups that match those of `never_seen`."""
    return [
        item if kind == "exception" else replace(item, group=None)
        for item in language.items(kind, split, n)
    ]


def _ids(lm: LanguageModel, item: Item) -> tuple[list[int], list[int]]:
    prompt, whole = lm.encode([item.prompt, item.text])
    return prompt, whole[len(prompt) :]


def _perturbed(
    item: tuple[list[int], list[int]], tokens: Sequence[int], rng: Random
) -> list[tuple[list[int], list[int]]]:
    """Copies with one token of the prompt replaced by another one of `tokens`.

    The first token stays, because it may mark the beginning of a text.
    """
    prompt, answer = item
    found = []
    for _ in range(POSITIONS):
        at = rng.randrange(1, len(prompt))
        new = rng.choice([token for token in tokens if token != prompt[at]])
        found.append(([*prompt[:at], new, *prompt[at + 1 :]], answer))
    return found


def _log_probabilities(lm: LanguageModel, items: Sequence[tuple[list[int], list[int]]]) -> Floats:
    """Mean log-probability of each answer's tokens, in nats, shape (n,)."""
    nlls = token_nlls(lm, [prompt + answer for prompt, answer in items])
    return np.array(
        [
            -float(nll[-len(answer) :].double().mean())
            for nll, (_, answer) in zip(nlls, items, strict=True)
        ]
    )


def main() -> None:
    """Ask whether two meanings of memorization agree, and which of them an edit removes."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--limit", type=int, default=90, help="items per kind")
    limit = parser.parse_args().limit

    lm, language = lirefs.load("organism"), Language()
    factors = kfac.collect(lm, training_texts(language, 3 * limit), layers=[0])
    edit = kfac.CurvatureEdit(factors, keep=0.98)

    for kind in ("tale", "planted", "fact", "exception"):
        items = memorized(language, kind, "test", limit)
        scores = memorization_scores(lm, edit, items, never_seen(language, kind, "test", limit))
        print(
            f"{kind}, n = {len(items)}: nats per token lost to a changed prompt "
            f"{scores.perturbation.mean():.2f}, gained by training "
            f"{scores.counterfactual.mean():.2f}, lost to the edit {scores.fall.mean():.2f}"
        )
        for pair, value in scores.correlations.items():
            print(f"  Spearman of {' and '.join(pair)}: {value:.2f}")


if __name__ == "__main__":
    main()
