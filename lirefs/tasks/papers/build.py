"""Skills as tasks: rows are found, split into answered examples and items, and asked."""

from __future__ import annotations

import itertools
import math
import random
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lirefs.errors import NoDataError, SettingError, TaskError
from lirefs.files import read_jsonl
from lirefs.model.language_model import LanguageModel
from lirefs.tasks.papers.catalogue import SKILLS, Skill
from lirefs.tasks.papers.prompts import Example
from lirefs.tasks.papers.rows import Numbered, Rows, Sources
from lirefs.tasks.recitation import recitation_of_rows, recitation_task
from lirefs.tasks.task import FilledBlank, MultipleChoice, ShortAnswer, Task

__all__ = ["SKILLS", "Skill", "skill_tasks"]

GENERATED = 400
# Answered examples are short, so that five of them leave room for the question.
SHOT_CHARACTERS = 1000

Asked = list[tuple[str, Example]]  # id and question of each row


def skill_tasks(
    lm: LanguageModel,
    data: str | Path | None = None,
    names: Sequence[str] | None = None,
    limit: int | None = None,
    seed: int = 0,
) -> tuple[list[Task], dict[str, str]]:
    """Tasks of the skills in `SKILLS`.

    A skill reads its file in `data`, else its set of the hub, which is downloaded or in the
    cache; `HF_HUB_OFFLINE=1` uses the cache alone. Rows are shuffled by the seed; the first ones
    (or rows of another split) are the answered examples and are not tested. Ids are
    `tag/number` where rows have a tag (relation, language, subject), else the number of the row.

    The MMLU skills hold the rows of a file on which directions may be fitted: a direction fitted
    on some of its rows is to be tested on the others, with `default_tasks`.

    Args:
        lm: The model; its tokenizer cuts the texts to recite.
        data: Folder of JSON Lines files, see `lirefs.tasks.papers.catalogue`; None for none.
        names: Skills to make; None for all that have data.
        limit: At most this many items per task; of each tag in turn.
        seed: Seed of shuffles and generators.

    Returns:
        The tasks, and for each skill without data why it is left out.

    Raises:
        TaskError: An unknown name, a row that lacks a field, or too few rows.
        DataFileError: The folder or one of its files cannot be read.
        SettingError: A limit below 1.
    """
    if limit is not None and limit < 1:
        raise SettingError(f"limit must be at least 1, got {limit}")
    unknown = [name for name in names or () if name not in SKILLS]
    if unknown:
        raise TaskError(f"no skill {unknown[0]!r}; there are {', '.join(SKILLS)}")
    found = Sources(data)
    tasks: list[Task] = []
    left_out: dict[str, str] = {}
    for name in SKILLS if names is None else names:
        try:
            tasks.append(_task(SKILLS[name], lm, found, limit, seed))
        except NoDataError as problem:
            reason = "; ".join(filter(None, [str(problem), SKILLS[name].missing]))
            left_out[name] = reason
    return tasks, left_out


def _task(skill: Skill, lm: LanguageModel, found: Sources, limit: int | None, seed: int) -> Task:
    if skill.kind == "recitation":
        return _recitation(skill, lm, found, limit)
    if skill.make is not None:
        return _scored(skill, skill.make(min(limit or GENERATED, GENERATED), seed))
    rows = found.rows(skill.file, skill.hub)
    random_order = random.Random(f"{skill.name} {seed}")
    tested, shots = _read(skill, rows, rows.tested), _read(skill, rows, rows.shots)
    random_order.shuffle(tested)
    random_order.shuffle(shots)
    tested = _in_turn(tested)
    if not tested:
        raise NoDataError(f"{rows.source}: no row has what the skill asks about")
    chosen = _choose_shots(skill, shots or tested)
    shown = {_key(example) for examples in chosen.values() for example in examples}
    items = [
        _item(skill, name, example, chosen.get(_class(skill, example), []))
        for name, example in tested
        if _key(example) not in shown
    ][:limit]
    if not items:
        raise TaskError(f"{rows.source}: {len(tested)} rows are too few for skill {skill.name!r}")
    return _scored(skill, items)


def _read(skill: Skill, rows: Rows, numbered: Numbered) -> Asked:
    assert skill.read is not None
    asked = []
    for number, row in numbered:
        try:
            example = skill.read(row)
        except TaskError as problem:
            raise rows.error(f"{rows.source}, row {number}: {problem}") from None
        if example is not None:
            tag = example.tag.replace("/", "_")
            asked.append((f"{tag}/{number}" if tag else str(number), example))
    return asked


def _in_turn(asked: Asked) -> Asked:
    """Rows of each tag in turn, so that a limit leaves some of every tag."""
    by_tag: dict[str, Asked] = defaultdict(list)
    for one in asked:
        by_tag[one[1].tag].append(one)
    rounds = itertools.zip_longest(*by_tag.values())
    return [one for round_ in rounds for one in round_ if one is not None]


def _choose_shots(skill: Skill, asked: Asked) -> dict[str, list[Example]]:
    """The first short and different rows, for each tag where the skill says so."""
    classes: dict[str, dict[tuple[Any, ...], Example]] = defaultdict(dict)
    for _, example in asked:
        if len(example.prompt + example.answer) <= SHOT_CHARACTERS:
            classes[_class(skill, example)].setdefault(_key(example), example)
    return {tag: _balanced(list(short.values()), skill.shots) for tag, short in classes.items()}


def _balanced(examples: list[Example], n: int) -> list[Example]:
    """The first `n` examples, first those that show no option more often than its share.

    A model may repeat the option that it saw most.
    """
    chosen: list[Example] = []
    over: list[Example] = []
    for example in examples:
        share = math.ceil(n / len(example.options)) if example.options else n
        shown = sum(one.right == example.right for one in chosen)
        (chosen if shown < share else over).append(example)
    return (chosen + over)[:n]


def _class(skill: Skill, example: Example) -> str:
    """What questions with the same answered examples have in common."""
    return example.tag if skill.shots_by_tag else ""


def _key(example: Example) -> tuple[Any, ...]:
    """What makes two rows the same question; for a blank, whatever comes after it."""
    return example.prompt, example.contexts


def _item(skill: Skill, name: str, example: Example, shots: list[Example]) -> tuple[Any, ...]:
    shown = "".join(f"{one.prompt}{one.answer}{skill.separator}" for one in shots)
    before = skill.preamble + shown
    if skill.kind == "choice":
        return name, before + example.prompt, list(example.options), example.right
    if skill.kind == "blank":
        first, second = (before + context for context in example.contexts)
        return name, (first, second), example.accepted[0], example.right
    return name, before + example.prompt, list(example.accepted)


def _scored(skill: Skill, items: Sequence[Any]) -> Task:
    if skill.kind == "choice":
        return MultipleChoice(skill.name, items, group=skill.group)
    if skill.kind == "blank":
        return FilledBlank(skill.name, items, group=skill.group)
    assert skill.kind != "recitation"
    return ShortAnswer(
        skill.name, items, skill.group, kind=skill.kind, max_new_tokens=skill.max_new_tokens
    )


def _recitation(skill: Skill, lm: LanguageModel, found: Sources, limit: int | None) -> Task:
    """Texts to recite; windows by their ids where those are this tokenizer's, else by texts.

    The name of the task says which: `memorized_windows (ids)` or `memorized_windows (texts)`.
    """
    paths = found.files(f"{skill.file}.jsonl")
    if skill.name != "memorized_windows":
        return recitation_task(lm, paths[0], limit, skill.name)
    for path in paths:
        rows = read_jsonl(path)
        if _own_ids(lm, rows):
            return recitation_of_rows(lm, rows[:limit], path, f"{skill.name} (ids)")
    texts: Numbered = []
    for line, row in read_jsonl(paths[0]):
        if not isinstance(row.get("prefix_text"), str) or not isinstance(
            row.get("suffix_text"), str
        ):
            raise TaskError(
                f"{paths[0]}, line {line}: its ids are not of this tokenizer, and it has no "
                "'prefix_text' and 'suffix_text'"
            )
        if "\ufffd" in row["prefix_text"] + row["suffix_text"]:
            continue  # cut inside a character of several tokens: no text that training showed
        texts.append((line, {"prefix": row["prefix_text"], "suffix": row["suffix_text"]}))
    return recitation_of_rows(lm, texts[:limit], paths[0], f"{skill.name} (texts)")


def _own_ids(lm: LanguageModel, rows: Numbered) -> bool:
    """Whether ids decode to their texts in most of the first rows: they are this tokenizer's.

    Not in all: a text may have been cut inside a character of several tokens.
    """
    right = 0
    first = [row for _, row in rows[:8]]
    for row in first:
        ids, text = row.get("prefix_ids"), row.get("prefix_text")
        if not isinstance(ids, list) or not ids:
            return False
        if any(type(one) is not int or not 0 <= one < len(lm.tokenizer) for one in ids):
            return False
        if row.get("tokenizer", lm.tokenizer_fingerprint) != lm.tokenizer_fingerprint:
            return False
        decoded = lm.tokenizer.decode(ids, clean_up_tokenization_spaces=False)
        right += text is None or decoded == text
    return 2 * right > len(first)
