"""Synthetic rows for every skill, with the documented fields."""

from __future__ import annotations

import json

N = 24


def letters(i, options, **more):
    return {
        "question": f"lettered {i}",
        "options": [f"option {i} {j}" for j in range(options)],
        "answer_index": i % options,
        **more,
    }


def lettered_options(i, n):
    lines = "\n".join(f"({'ABCDEFG'[j]}) thing {j}" for j in range(n))
    return f"Puzzle {i}.\nOptions:\n{lines}", f"({'ABCDEFG'[i % n]})"


def bbh(task, i):
    sizes = {"three": 3, "five": 5, "seven": 7}
    for word, n in sizes.items():
        if word in task:
            text, target = lettered_options(i, n)
            return {"task": task, "input": text, "target": target}
    text, target = {
        "bbh_boolean_expressions": (f"not ( True ) {i} is", str(i % 2 == 0)),
        "bbh_web_of_lies": (f"Question: Ann {i} lies?", "Yes" if i % 2 else "No"),
        "bbh_multistep_arithmetic_two": (f"(({i} - 30)) =", str(i - 30)),
        "bbh_object_counting": (f"I have {i} pears. How many fruits?", str(i)),
    }[task]
    return {"task": task, "input": text, "target": target}


def rows_of(file):
    """Rows with the documented fields."""
    if file.startswith("bbh_"):
        return [bbh(file, i) for i in range(N)]
    make = {
        "memorized_windows*": lambda i: {
            "prefix_ids": [30 + i, 31, 32],
            "suffix_ids": [33, 34],
            "prefix_text": "not what the ids say",
            "suffix_text": f" suffix {i}",
        },
        "quotes": lambda i: {"prefix": f"A quote {i} in mid-wo", "suffix": "rd ends"},
        "gsm8k": lambda i: {"question": f"problem {i}", "answer": f"so <<{i}>>\n#### {i},000"},
        "gsm_symbolic": lambda i: {"question": f"problem {i}", "answer": f"#### -{i}"},
        "mgsm": lambda i: {"question": f"p {i}", "answer": i, "language": ["de", "te"][i % 2]},
        "mmlu_pro": lambda i: letters(i, 10, category=["math", "computer science"][i % 2]),
        "popqa": lambda i: {"question": f"who {i}?", "answers": [f"a {i}", "b"], "relation": "r"},
        "triviaqa": lambda i: {
            "question": f"what {i}?",
            "answers": [f"thing{i}"],
            "context": f"It is said that thing{i} is it.",
        },
        "relations": lambda i: {
            "relation": ["capital", "ceo"][i % 2],
            "prompt": ["The capital of {} is", "{} is led by"][i % 2],
            "subject": f"place {i}",
            "object": f"Name\\u00ed {i}",
        },
        "mmlu_reasoning_memory": lambda i: letters(i, 4, label=["memory", "reasoning"][i % 2]),
        "ceval_h": lambda i: letters(i, 4, subject="law"),
        "boolq": lambda i: {"passage": f"text {i}", "question": f"is {i} so", "answer": i % 2 == 0},
        "openbookqa": lambda i: letters(i, 4, fact=f"fact {i}"),
        "winogrande": lambda i: {
            "sentence": f"Ann met Eve {i} and _ was glad.",
            "option1": "Ann",
            "option2": "Eve",
            "answer": str(1 + i % 2),
        },
    }[file]
    return [make(i) for i in range(N)]


def write(folder, file, rows=None):
    path = folder / f"{file.replace('*', '_x')}.jsonl"
    path.write_text("\n".join(map(json.dumps, rows_of(file) if rows is None else rows)))
    return path
