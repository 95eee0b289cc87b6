"""Fuzzed: questions, grades, texts and the rows of skills."""

from __future__ import annotations

import functools
from pathlib import Path

from fuzz_values import check, finite, lines, text, tiny_lm, whole, written
from fuzzing import Format
from skill_rows import rows_of

import lirefs
from lirefs.errors import NoDataError
from lirefs.tasks.papers.build import skill_tasks
from lirefs.tasks.papers.catalogue import SKILLS
from lirefs.tasks.texts import plain_texts


def make_questions(folder: Path) -> list[bytes]:
    rows = [
        {
            "question": f"What is {i} and {i}?",
            "label": ("reasoning", "memory")[i % 2],
            "id": f"q{i}",
            "options": ["a", "b"],
            "answer_index": i % 2,
            "subject": "maths",
        }
        for i in range(12)
    ]
    sides = ("train", "validation", "test")
    return [lines(rows), lines([{**row, "split": sides[i // 4]} for i, row in enumerate(rows)])]


def read_questions(folder: Path, content: bytes) -> None:
    found = lirefs.load_questions(written(folder, "q.jsonl", content))
    for one in found:
        check(all(map(text, (one.text, one.label, one.id, one.subject, one.side))), f"{one!r:.200}")
        check(all(map(text, one.options)) and one.text, "options")
        check(one.answer_index is None or one.options[one.answer_index] is not None, "answer")
        check(text(one.prompt) and one.key is not None, "prompt")
    tiny_lm().encode(found.prompts)
    for side in found.split(seed=0).sides.values():
        check(set(side.labels) == {0, 1}, "a side of one label")


def make_grades(folder: Path) -> list[bytes]:
    rows = [{"id": f"q{i}", "question": "x", "score": i / 7} for i in range(8)]
    return [lines(rows), lines([{"question": "x", "score": i % 2} for i in range(8)])]


def read_grades(folder: Path, content: bytes) -> None:
    found = lirefs.load_questions(written(folder, "g.jsonl", content))
    check(all(one.score is None or finite(one.score) for one in found), "grades")


def make_memorized(folder: Path) -> list[bytes]:
    tokenizer = tiny_lm().tokenizer_fingerprint
    return [
        lines([{"id": f"t{i}", "text": f"a text {i} of some length to cut"} for i in range(4)]),
        lines([{"prefix": "it begins in", "suffix": " this way", "suffix_tokens": 4}] * 3),
        lines([{"prefix": f"it begins {i} in", "suffix": " this way"} for i in range(3)]),
        lines([{"prefix_ids": [5, 6, i], "suffix_ids": [7, 8], "tokenizer": tokenizer}
               for i in range(3)]),
    ]  # fmt: skip


def read_memorized(folder: Path, content: bytes) -> None:
    found = lirefs.recitation_task(tiny_lm(), written(folder, "m.jsonl", content))
    for name, prefix, suffix in found.items:
        check(text(name) and prefix and suffix, "an empty side")
        check(all(whole(one) and one < 128 for one in (*prefix, *suffix)), "ids")


def make_corpus(folder: Path) -> list[bytes]:
    rows = [{"id": f"t{i}", "text": f"a text, n° {i}\nof two lines", "n": i} for i in range(4)]
    return [lines(rows), lines([{"text": row["text"]} for row in rows])]


def read_corpus(folder: Path, content: bytes) -> None:
    path = written(folder, "corpus.jsonl", content)
    (folder / "texts").mkdir()
    written(folder / "texts", "plain.txt", content)
    refused = []
    for source in (path, folder / "texts"):
        try:
            for name, one in plain_texts([source], "texts"):
                check(text(name) and text(one), "text")
                tiny_lm().encode([one[:200]])
        except lirefs.LirefsError as error:
            refused.append(error)
    if refused:
        raise refused[0]


def make_skill(file: str, folder: Path) -> list[bytes]:
    return [lines(rows_of(file)[:12])]


def read_skill(file: str, folder: Path, content: bytes) -> None:
    written(folder, f"{file.replace('*', '_x')}.jsonl", content)
    names = [name for name, skill in SKILLS.items() if skill.file == file]
    tasks, left_out = skill_tasks(tiny_lm(), folder, names)
    for task in tasks:
        for item in task.items:
            parts = [item[0], item[1]] if isinstance(item[1], str) else [item[0]]
            check(all(map(text, parts)), f"{item!r:.200}")
        check(0 <= task.chance <= 1, "chance")
    if not tasks:
        raise NoDataError(f"{left_out}")


FORMATS: dict[str, Format] = {
    "questions": Format("lines", make_questions, read_questions),
    "grades": Format("lines", make_grades, read_grades),
    "memorized texts": Format("lines", make_memorized, read_memorized),
    "corpus": Format("lines", make_corpus, read_corpus),
    **{
        f"rows of {file}": Format(
            "lines", functools.partial(make_skill, file), functools.partial(read_skill, file)
        )
        for file in sorted({skill.file for skill in SKILLS.values() if skill.file})
    },
}
