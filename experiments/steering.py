"""Does steering a real model do more than a random direction, by layer, strength and question set?

A direction from memory to reasoning is fitted at each layer on train questions. For each task, the
layer and the strength that score best on validation items are then run on test items, next to five
random directions of the same norm and one at the same perplexity; passages that the model recites
are run under each chosen setting, too. The table has every effect with the difference that so many
items can detect.

    python -m experiments.steering --model smollm2-135m

takes question sets of your own by `--questions FILE ...`. Interrupted, the same command continues.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import lirefs
from lirefs import Direction, LanguageModel, Steer
from lirefs.comparison import BASELINE, Comparison
from lirefs.files import atomic_write_text
from lirefs.main_job.matching import TEXTS, Damage, Match, steering_rival
from lirefs.main_job.organism import against_random
from lirefs.statistics import Estimate
from lirefs.tasks import (
    MultipleChoice,
    ShortAnswer,
    Task,
    fact_items,
    heldout_texts,
    recitation_task,
    synthetic,
)
from lirefs.tasks.shipped_data import DATA

RANDOM_DIRECTIONS = 5
ITEMS = 60
"""Items of a task on a side."""


@dataclass(frozen=True)
class Effect:
    """What a setting that was chosen on validation items does to a task on test items.

    Attributes:
        task: The task's name.
        setting: The layer and the strength.
        unchanged: Score without steering.
        difference: Score under steering minus that, paired.
        p: Of no difference. It needs no correction for the choice, which saw other items.
        detectable: Difference from the unchanged model that so many items detect with 80 % power.
        beyond: Score under steering minus the mean under random directions of its norm, paired.
        matched: The same against a random direction at its perplexity; None if there is none.
    """

    task: str
    setting: str
    unchanged: Estimate
    difference: Estimate
    p: float
    detectable: float
    beyond: Estimate
    matched: Estimate | None


def tasks_of(side: str, limit: int) -> list[Task]:
    """Tasks that a small model can do and does not do perfectly; the sides share no item."""
    first = side == "validation"
    facts = {
        book: [*fact_items("common", book == "open"), *fact_items("rare", book == "open")]
        for book in ("open", "closed")
    }
    sums, hats = synthetic.addition_items(2 * ITEMS), synthetic.elimination_items(2 * ITEMS)

    def half(items: Sequence[Any]) -> list[Any]:
        return list(items[first::2])[:limit]

    return [
        MultipleChoice("elimination", half(hats)),
        ShortAnswer("two-digit addition", half(sums), "arithmetic", kind="number"),
        *(
            ShortAnswer(f"facts, {book} book", half(items), f"{book}-book", max_new_tokens=8)
            for book, items in facts.items()
        ),
    ]


def controls_of(
    name: str, direction: Direction, strength: float, damage: Damage
) -> tuple[dict[str, Steer], Match]:
    """Random directions of the norm of a setting, and one at its perplexity, which comes last."""
    found = {
        f"{name}, random {i}": Steer(direction.random_like(seed=i), "add", strength)
        for i in range(RANDOM_DIRECTIONS)
    }
    other = direction.random_like(seed=RANDOM_DIRECTIONS)
    goals = damage.goals(Steer(direction, "add", strength))
    match = steering_rival(lambda a: Steer(other, "add", a), strength).at(goals)
    return found | {f"{name}, random at its perplexity": match.intervention}, match


def effects(
    lm: LanguageModel, questions: lirefs.Questions, options: argparse.Namespace, journal: Path
) -> list[Effect]:
    """Choose a setting for each task on validation items; its effects on test items."""
    directions = lirefs.fit(lm, questions, seed=options.seed).directions
    settings = {
        f"layer {layer}, strength {strength:g}": (directions[layer], strength)
        for layer in options.layers or range(1, lm.n_layers, 3)
        for strength in options.strengths
    }
    variants = {name: Steer(one, "add", strength) for name, (one, strength) in settings.items()}
    compared: dict[str, Any] = {"seed": options.seed, "journal": journal}
    asked = tasks_of("validation", options.limit)
    found = lirefs.compare(lm, variants, asked, **compared)
    chosen = {
        task.name: max(variants, key=lambda name: found.score(name, task.name)) for task in asked
    }
    damage = Damage(lm, [text for _, text in heldout_texts("validation")][: options.texts])
    controls = {one: controls_of(one, *settings[one], damage) for one in set(chosen.values())}
    tested = {name: variants[name] for name in controls}
    for some, _ in controls.values():
        tested |= some
    recited = recitation_task(lm, DATA / "passages.jsonl", options.limit)
    test = lirefs.compare(lm, tested, [*tasks_of("test", options.limit), recited], **compared)
    pairs = [*chosen.items(), *((recited.name, name) for name in controls)]
    return [effect(test, task, name, *controls[name]) for task, name in pairs]


def effect(
    test: Comparison, task: str, setting: str, controls: Mapping[str, Steer], match: Match
) -> Effect:
    """One setting on one task."""
    *random, matched = controls
    cell = test.cell(setting, task)
    assert cell.difference is not None
    assert cell.p is not None
    assert cell.detectable is not None
    return Effect(
        task=task,
        setting=setting,
        unchanged=test.cell(BASELINE, task).value,
        difference=cell.difference,
        p=cell.p,
        detectable=cell.detectable,
        beyond=against_random(test, task, setting, random),
        matched=against_random(test, task, setting, [matched]) if match.equal else None,
    )


def table(found: Mapping[str, Sequence[Effect]]) -> str:
    """The effects as Markdown; differences in points."""
    heads = ["questions", "task (n)", "setting", "unchanged", "steered minus unchanged", "p",
             "detectable", "beyond random, same norm", "same perplexity"]  # fmt: skip
    lines = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    for name, some in found.items():
        for one in some:
            differences = [one.difference, one.beyond, one.matched]
            moved, beyond, matched = ("-" if each is None else points(each) for each in differences)
            lines.append(
                f"| {name} | {one.task} ({one.unchanged.n}) | {one.setting} "
                f"| {100 * one.unchanged.value:.0f} % | {moved} | {one.p:.3f} "
                f"| {100 * one.detectable:.0f} | {beyond} | {matched} |"
            )
    clear = [
        f"{one.task}, {one.setting}"
        for some in found.values()
        for one in some
        if one.beyond.low > 0 or one.beyond.high < 0
    ]
    return "\n".join([*lines, "", f"Beyond random directions: {'; '.join(clear) or 'nothing'}."])


def points(difference: Estimate) -> str:
    """A difference between shares with its interval, in points."""
    value, low, high = (100 * one for one in (difference.value, difference.low, difference.high))
    return f"{value:+.0f} [{low:+.0f}, {high:+.0f}]"


def main() -> None:
    """Parse the arguments, run, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2-135m", help="built-in name, folder or hub id")
    parser.add_argument("--questions", nargs="+", default=["default"], help="sets or files")
    parser.add_argument("--layers", type=int, nargs="+", help="default: every third from the first")
    parser.add_argument("--strengths", type=float, nargs="+", default=[-2.0, -1.0, 1.0, 2.0, 4.0])
    parser.add_argument("--limit", type=int, default=ITEMS + 2, help="items of a task on a side")
    parser.add_argument("--texts", type=int, default=TEXTS, help="that perplexity is matched on")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("steering"), help="folder of the results")
    options = parser.parse_args()
    lm = lirefs.load(options.model)
    found = {
        Path(name).stem: effects(lm, lirefs.load_questions(name), options, options.out / "journal")
        for name in options.questions
    }
    rows = {name: [asdict(one) for one in some] for name, some in found.items()}
    atomic_write_text(options.out / "steering.json", json.dumps(rows, indent=1))
    atomic_write_text(options.out / "steering.md", table(found) + "\n")
    print(table(found))


if __name__ == "__main__":
    main()
