"""Items per second compared with lm-evaluation-harness's own HFLM on the same items and model.

    python benchmarks/harness.py --questions FILE     # needs: pip install 'lm-eval>=0.4.13'

Both answer the same lm-eval requests in one process. Every round runs both on everything, so that
a slow minute of the machine affects both; a ratio is the median over rounds of the ratio within a
round. Batches of both hold at most `--batch-tokens` tokens, padding included. The run fails if the
two choose different options in multiple choice.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import platform
import random
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import lm_eval
import torch
import transformers
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from measuring import synchronize, versions, with_range

import lirefs
from lirefs.files import atomic_write_text
from lirefs.questions import Question
from lirefs.tasks import fact_items

LETTERS = "ABCD"
STORY = "A {} lived by the {}. One day"
SUBJECTS = 4
"""Subjects that have examples of their own, where questions of several are mixed."""


def request(kind: str, *arguments: Any) -> Instance:
    """One lm-eval request that belongs to no task."""
    return Instance(kind, {}, arguments, 0, metadata=("benchmark", 0, 1))


def letter_requests(
    questions: Sequence[Question], examples: Sequence[Question] = ()
) -> list[Instance]:
    """Questions in MMLU's form: the options are listed and their letters are scored."""

    def ask(one: Question) -> str:
        listed = "\n".join(f"{a}. {b}" for a, b in zip(LETTERS, one.options, strict=True))
        return f"{one.text}\n{listed}\nAnswer:"

    shown = "".join(f"{ask(one)} {LETTERS[one.answer_index or 0]}\n\n" for one in examples)
    return [
        request("loglikelihood", shown + ask(one), f" {letter}")
        for one in questions
        for letter in LETTERS
    ]


def text_requests(questions: Sequence[Question]) -> list[Instance]:
    """Questions in ARC's form: the text of each option is scored."""
    return [
        request("loglikelihood", f"Question: {one.text}\nAnswer:", f" {option}")
        for one in questions
        for option in one.options
    ]


def short_requests(count: int) -> list[Instance]:
    """Facts after four answered examples, up to the end of the line."""
    settings = {"until": ["\n"], "max_gen_toks": 16}
    prompts = [prompt for _, prompt, _ in fact_items("common", with_passage=False)[:count]]
    return [request("generate_until", prompt, settings) for prompt in prompts]


def worked_requests(count: int, tokens: int) -> list[Instance]:
    """Sums of several steps after four worked examples, up to a blank line."""
    draw = random.Random(0)

    def problem(steps: int) -> tuple[str, str]:
        total, asked, worked = draw.randint(20, 60), "", ""
        asked = f"Ann has {total} coins"
        for _ in range(steps):
            change = draw.randint(2, 9)
            asked += f", then finds {change}"
            worked += f" {total} + {change} = {total + change}."
            total += change
        return f"Problem: {asked}.\nSteps:", f"{worked}\nAnswer: {total}\n\n"

    shown = "".join("".join(problem(steps)) for steps in (1, 3, 2, 4))
    settings = {"until": ["\n\n"], "max_gen_toks": tokens}
    prompts = [shown + problem(1 + index % 4)[0] for index in range(count)]
    return [request("generate_until", prompt, settings) for prompt in prompts]


def story_requests(count: int, tokens: int) -> list[Instance]:
    """Stories without a common prefix, which seldom end before the limit."""
    people, places = ("fox", "king", "baker", "girl", "robot"), ("sea", "river", "old mill")
    prompts = [STORY.format(people[i % 5], places[i % 3]) for i in range(count)]
    settings = {"until": ["\n\n"], "max_gen_toks": tokens}
    return [request("generate_until", prompt, settings) for prompt in prompts]


def rows_of(lm: lirefs.LanguageModel, requests: Sequence[Instance], batch_tokens: int) -> int:
    """Batch size of HFLM at which a batch holds at most that many tokens."""
    lengths = []
    for one in requests:
        prompt, rest = one.args
        generated = rest["max_gen_toks"] if isinstance(rest, dict) else 0
        lengths.append(len(lm.encode([prompt + ("" if generated else rest)])[0]) + generated)
    return max(1, batch_tokens // max(lengths))


def chosen(values: Sequence[tuple[float, bool]]) -> list[int]:
    """Index of the most likely option of each group of four."""
    fours = [values[start : start + 4] for start in range(0, len(values), 4)]
    return [max(range(4), key=lambda index: four[index][0]) for four in fours]


def timed(run: Callable[[], Any]) -> tuple[float, Any]:
    """Return seconds and the result.

    With one thread and no accelerator, only the time of this process counts, not that of other
    programs on the same core.
    """
    alone = torch.get_num_threads() == 1 and not torch.cuda.is_available()
    clock = time.process_time if alone else time.perf_counter
    synchronize()
    start = clock()
    result = run()
    synchronize()
    return clock() - start, result


def against_hflm(
    lm: lirefs.LanguageModel, workloads: dict[str, list[Instance]], batch_tokens: int, rounds: int
) -> dict[str, dict[str, Any]]:
    """Times of both on each workload, and how well their results agree."""
    ours = lirefs.lm_eval_model(lm, batch_tokens=batch_tokens)
    peers = {
        name: HFLM(
            pretrained=lm.model,
            tokenizer=lm.tokenizer,
            batch_size=rows_of(lm, requests, batch_tokens),
        )
        for name, requests in workloads.items()
    }
    found: dict[str, dict[str, Any]] = {
        name: {"items": len(requests), "ours": [], "hflm": []}
        for name, requests in workloads.items()
    }
    for index in range(rounds + 1):
        for name, requests in workloads.items():
            row, kind = found[name], requests[0].request_type

            def run(model: Any, kind: str = kind, requests: Any = requests) -> Any:
                return timed(lambda: getattr(model, kind)(requests, disable_tqdm=True))

            # Which goes first changes from round to round.
            order = (ours, peers[name]) if index % 2 else (peers[name], ours)
            answers = {id(model): run(model) for model in order}
            (spent, mine), (peer_spent, theirs) = answers[id(ours)], answers[id(peers[name])]
            if kind == "loglikelihood":
                row["items"] = len(requests) // 4
                row["agree"] = statistics.mean(
                    float(a == b) for a, b in zip(chosen(mine), chosen(theirs), strict=True)
                )
                row["difference"] = max(
                    abs(a - b) for (a, _), (b, _) in zip(mine, theirs, strict=True)
                )
                if row["agree"] < 1:
                    raise SystemExit(f"{name}: only {row['agree']:.1%} of the choices agree")
            else:
                row["agree"] = statistics.mean(
                    float(a == b) for a, b in zip(mine, theirs, strict=True)
                )
            if index:  # the first round warms up
                row["ours"].append(spent)
                row["hflm"].append(peer_spent)
    for row in found.values():
        row["ratios"] = [b / a for a, b in zip(row["ours"], row["hflm"], strict=True)]
    return found


def eight_variants(
    lm: lirefs.LanguageModel, questions: Sequence[Question], rounds: int
) -> dict[str, Any]:
    """Time of `lirefs.compare` with eight variants, as a multiple of its time with one."""
    generator = torch.Generator().manual_seed(0)
    vector = torch.randn(lm.width, generator=generator)
    steers = {
        f"steering {i}": lirefs.Steer(
            lirefs.Direction(vector / vector.norm(), 1 + i % (lm.n_layers - 1)), "add", 1.0
        )
        for i in range(7)
    }
    items = [
        (f"{i}", f"Question: {one.text}\nAnswer:", [f" {o}" for o in one.options], 0)
        for i, one in enumerate(questions)
    ]
    tasks = [lirefs.MultipleChoice("questions", items)]
    times: dict[str, list[float]] = {"one": [], "eight": []}
    cases: list[tuple[str, dict[str, Any]]] = [("one", {}), ("eight", steers)]
    for index in range(rounds + 1):
        for name, variants in cases:
            run = functools.partial(lirefs.compare, lm, variants, tasks, progress=False)
            spent, _ = timed(run)
            if index:
                times[name].append(spent)
    pairs = zip(times["eight"], times["one"], strict=True)
    return {**times, "items": len(items), "ratios": [a / b for a, b in pairs]}


def main() -> None:
    """Measure, then print and write the results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2-135m", help="name, folder or hub id")
    parser.add_argument("--questions", type=Path, help="JSON Lines; default: the built-in set")
    parser.add_argument("--items", type=int, default=24, help="items per workload")
    parser.add_argument("--tokens", type=int, default=48, help="length of a long answer")
    parser.add_argument("--batch-tokens", type=int, default=4096)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path("benchmark-harness.json"))
    args = parser.parse_args()
    lm = lirefs.load(args.model)
    asked = lirefs.load_questions(args.questions) if args.questions else lirefs.load_questions()
    usable = [one for one in asked if one.options and len(one.options) == 4]
    sample = random.Random(0).sample(usable, min(args.items + 3 * SUBJECTS, len(usable)))
    examples = [sample[3 * subject :][:3] for subject in range(SUBJECTS)]
    questions = sample[3 * SUBJECTS :]
    workloads = {
        "choice, letters": letter_requests(questions),
        "choice, letters, 3 examples": letter_requests(questions, examples[0]),
        "the same of 4 subjects, mixed": [
            one
            for index, question in enumerate(questions)
            for one in letter_requests([question], examples[index % SUBJECTS])
        ],
        "choice, option texts": text_requests(questions),
        "short answers": short_requests(args.items),
        "worked answers": worked_requests(args.items, args.tokens),
        "stories": story_requests(args.items, args.tokens),
    }
    found = against_hflm(lm, workloads, args.batch_tokens, args.rounds)
    variants = eight_variants(lm, questions[:8], args.rounds)
    print(f"\n{'':32}{'items':>6}{'ours/s':>9}{'HFLM/s':>9}{'ratio [range]':>20}{'same':>7}")
    for name, row in found.items():
        ours, hflm = (row["items"] / statistics.median(row[key]) for key in ("ours", "hflm"))
        ratio = with_range(row["ratios"])
        print(f"{name:32}{row['items']:6}{ours:9.2f}{hflm:9.2f}{ratio:>20}{row['agree']:7.0%}")
    print(f"eight variants cost {with_range(variants['ratios'])} times one")
    print(f"{args.rounds} rounds; {versions('torch', 'transformers', 'lm_eval')}")
    report = {
        "model": lm.name,
        "device": str(lm.device),
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "versions": {one.__name__: one.__version__ for one in (torch, transformers, lm_eval)},
        "batch_tokens": args.batch_tokens,
        "against_hflm": found,
        "eight_variants": variants,
    }
    atomic_write_text(args.out, json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
