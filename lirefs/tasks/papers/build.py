"""Skills as tasks: load rows, split them into answered examples and items, and make prompts."""

from __future__ import annotations

import itertools
import math
import random
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from lirefs.errors import NoDataError, SettingError, TaskError, checked_seed
from lirefs.model.language_model import LanguageModel
from lirefs.tasks.papers.catalogue import SKILLS, Skill
from lirefs.tasks.papers.prompts import Example
from lirefs.tasks.papers.skill_data import NumberedRows, SkillData, SkillDataLoader
from lirefs.tasks.recitation import recitation_of_rows, recitation_task
from lirefs.tasks.task import FilledBlank, MultipleChoice, ShortAnswer, Task
from lirefs.tasks.texts import TextRow, text_rows

GENERATED = 400
# Answered examples are short, so that five of them leave room for the question.
SHOT_CHARACTERS = 1000

Asked = list[tuple[str, str, Example]]  # of each row: id, key of its answered examples, question


def skill_tasks(
    lm: LanguageModel,
    data: str | Path | None = None,
    names: Sequence[str] | None = None,
    limit: int | None = None,
    seed: int = 0,
) -> tuple[list[Task], dict[str, str]]:
    """Tasks of the skills in `SKILLS`.

    A skill reads its file in `data`, else its dataset on the hub, which is downloaded or taken
    from the cache; `HF_HUB_OFFLINE=1` uses the cache alone. Rows are shuffled; the first ones (or
    rows of another split) are the answered examples and are not tested. Ids are `tag/number` where
    rows have a tag (relation, language, subject), else the number of the row.

    A direction may have been fitted on rows of the MMLU skills: `suite_tasks` leaves those out.

    Args:
        lm: The model; its tokenizer cuts the texts to recite.
        data: Folder of JSON Lines files, see `lirefs.tasks.papers.catalogue`; None for none.
        names: Skills to test; None for all that have data.
        limit: At most this many items per task, taken from each tag in turn.
        seed: Seed of shuffles and generators.

    Returns:
        The tasks, and for each skill without data the reason why it is left out.

    Raises:
        TaskError: An unknown name, a row that lacks a field, or too few rows.
        DataFileError: The folder or one of its files cannot be read.
        SettingError: A limit below 1.
    """
    seed = checked_seed(seed)
    if limit is not None and limit < 1:
        raise SettingError(f"limit must be at least 1, got {limit}")
    if unknown := [name for name in names or () if name not in SKILLS]:
        raise TaskError(f"no skill {unknown[0]!r}; there are {', '.join(SKILLS)}")
    loader = SkillDataLoader(data)
    tasks: list[Task] = []
    left_out: dict[str, str] = {}
    for name in SKILLS if names is None else names:
        skill = SKILLS[name]
        try:
            tasks.append(_task(skill, lm, loader, limit, seed))
        except NoDataError as problem:
            left_out[name] = f"{problem}; {skill.missing}" if skill.missing else str(problem)
    return tasks, left_out


def _task(
    skill: Skill, lm: LanguageModel, loader: SkillDataLoader, limit: int | None, seed: int
) -> Task:
    if skill.scoring == "recitation":
        return _recitation(skill, lm, loader, limit)
    if skill.generate is not None:
        return _scored(skill, skill.generate(min(limit or GENERATED, GENERATED), seed))
    data = loader.load(skill.file, skill.hub)
    order = random.Random(f"{skill.name} {seed}")
    tested, shots = _read(skill, data, data.tested), _read(skill, data, data.shots)
    order.shuffle(tested)
    order.shuffle(shots)
    tested = _in_turn(tested)
    if not tested:
        raise NoDataError(f"{data.source}: no row has the fields that the skill asks about")
    chosen = _choose_shots(skill, shots or tested)
    shown = {_key(example) for examples in chosen.values() for example in examples}
    items = [
        _item(skill, name, example, chosen.get(group, []))
        for name, group, example in tested
        if _key(example) not in shown
    ][:limit]
    if not items:
        raise TaskError(f"{data.source}: {len(tested)} rows are too few for skill {skill.name!r}")
    return _scored(skill, items)


def _read(skill: Skill, data: SkillData, rows: NumberedRows) -> Asked:
    assert skill.read is not None
    asked = []
    for number, row in rows:
        try:
            example = skill.read(row)
        except TaskError as problem:
            raise data.error(f"{data.source}, row {number}: {problem}") from None
        if example is not None:
            tag = example.tag.replace("/", "_")
            group = example.tag if skill.shots_by_tag else ""
            asked.append((f"{tag}/{number}" if tag else str(number), group, example))
    return asked


def _in_turn(asked: Asked) -> Asked:
    """Rows of each tag in turn, so that a limit keeps some of every tag."""
    by_tag: dict[str, Asked] = defaultdict(list)
    for one in asked:
        by_tag[one[2].tag].append(one)
    rounds = itertools.zip_longest(*by_tag.values())
    return [one for one in itertools.chain.from_iterable(rounds) if one is not None]


def _choose_shots(skill: Skill, asked: Asked) -> dict[str, list[Example]]:
    """The first distinct short rows, for each tag separately where the skill says so."""
    short: dict[str, dict[tuple[Any, ...], Example]] = defaultdict(dict)
    for _, group, example in asked:
        if len(example.prompt + example.answer) <= SHOT_CHARACTERS:
            short[group].setdefault(_key(example), example)
    return {group: _balanced(some.values(), skill.shots) for group, some in short.items()}


def _balanced(examples: Iterable[Example], n: int) -> list[Example]:
    """The first `n` examples; those of an option beyond its share come last: models repeat it."""
    chosen: list[Example] = []
    over: list[Example] = []
    for example in examples:
        share = math.ceil(n / max(1, len(example.options)))
        shown = sum(one.right == example.right for one in chosen)
        (chosen if shown < share else over).append(example)
    return (chosen + over)[:n]


def _key(example: Example) -> tuple[Any, ...]:
    """Rows with the same key ask the same question; for a blank, whatever comes after it."""
    return example.prompt, example.contexts


def _item(skill: Skill, name: str, example: Example, shots: list[Example]) -> tuple[Any, ...]:
    shown = [f"{one.prompt}{one.answer}{skill.separator}" for one in shots]
    before = "".join([skill.preamble, *shown])
    if skill.scoring == "choice":
        return name, before + example.prompt, list(example.options), example.right
    if skill.scoring == "blank":
        contexts = tuple(before + context for context in example.contexts)
        return name, contexts, example.accepted[0], example.right
    return name, before + example.prompt, list(example.accepted)


def _scored(skill: Skill, items: Sequence[Any]) -> Task:
    if skill.scoring == "choice":
        return MultipleChoice(skill.name, items, group=skill.group)
    if skill.scoring == "blank":
        return FilledBlank(skill.name, items, group=skill.group)
    assert skill.scoring != "recitation"
    return ShortAnswer(
        skill.name, items, skill.group, kind=skill.scoring, max_new_tokens=skill.max_new_tokens
    )


def _recitation(
    skill: Skill, lm: LanguageModel, loader: SkillDataLoader, limit: int | None
) -> Task:
    """Texts to recite; windows by their ids if those are of this tokenizer, else by their texts."""
    paths = loader.files(f"{skill.file}.jsonl")
    if skill.name != "memorized_windows":
        return recitation_task(lm, paths[0], limit, skill.name)
    for path in paths:
        rows = text_rows(path, "windows")
        if _own_ids(lm, rows):
            return recitation_of_rows(lm, rows[:limit], f"{skill.name} (ids)")
    texts: list[TextRow] = []
    for number, row in enumerate(text_rows(paths[0], "windows"), start=1):
        prefix, suffix = row.fields.get("prefix_text"), row.fields.get("suffix_text")
        if not isinstance(prefix, str) or not isinstance(suffix, str):
            raise TaskError(
                f"{row.where}: its ids are not of this tokenizer, and it has no "
                "'prefix_text' and 'suffix_text'"
            )
        if "\ufffd" not in prefix + suffix:  # else cut inside a character: training showed no such
            fields = {"prefix": prefix, "suffix": suffix}
            texts.append(TextRow(f"line-{number}", row.where, fields))
    return recitation_of_rows(lm, texts[:limit], f"{skill.name} (texts)")


def _own_ids(lm: LanguageModel, rows: Sequence[TextRow]) -> bool:
    """Whether most of the first ids decode to their texts (a text may end inside a character)."""
    rows, right = rows[:8], 0
    for row in (one.fields for one in rows):
        ids, text = row.get("prefix_ids"), row.get("prefix_text")
        if (
            not isinstance(ids, list)
            or not ids
            or any(type(one) is not int or not 0 <= one < len(lm.tokenizer) for one in ids)
            or row.get("tokenizer", lm.tokenizer_fingerprint) != lm.tokenizer_fingerprint
        ):
            return False
        decoded = lm.tokenizer.decode(ids, clean_up_tokenization_spaces=False)
        right += text is None or decoded == text
    return 2 * right > len(rows)
