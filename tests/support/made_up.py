"""Comparisons of made-up answers, without a model."""

from __future__ import annotations

import io
import random
from dataclasses import replace
from typing import Any

from PIL import Image

from lirefs.comparison import Comparison, TaskInfo
from lirefs.pictures import Picture
from lirefs.tasks.task import CONFLICT, GROUPS, ItemResult

SHARED = (
    "Question: how many legs has a cat?\nAnswer: 4\n\nQuestion: how many has a bird?\nAnswer: 2\n\n"
)
NASTY = (
    "</script><script>document.title='broken'</script><!-- <b id=broken>&amp;</b> \u2028 | \\ \""
)


def drawn(shade: int = 0) -> Picture:
    """A small picture."""
    png = io.BytesIO()
    Image.new("L", (2, 2), shade).save(png, "PNG")
    return Picture(png.getvalue(), b"<svg xmlns='http://www.w3.org/2000/svg'/>")


def made_up(
    tasks: int = 5, variants: int = 2, items: int = 20, seed: int = 0, **settings: Any
) -> Comparison:
    """A comparison over all groups, with p-values already filled in.

    The first task's items share a beginning and contain text that is not safe in HTML.
    """
    generator = random.Random(seed)
    groups = [*GROUPS[:5], CONFLICT]
    infos = {
        f"task {i} of {groups[i % 6]}": TaskInfo(groups[i % 6], "accuracy", 0.1)
        for i in range(tasks - 1)
    }
    infos["texts"] = TaskInfo("language", "perplexity")
    results: dict[str, dict[str, list[ItemResult]]] = {}
    for v, name in enumerate(["unchanged", *(f"variant {chr(65 + k)}" for k in range(variants))]):
        results[name] = {
            task: [_item(info, task, i, v, generator) for i in range(items)]
            for task, info in infos.items()
        }
    provenance = {"model_name": "made up", "model": "0" * 64, "nested": {"keep": {"a": 0.5}}}
    found = Comparison(results, infos, {**provenance, **settings}, resamples=50)
    return with_tests(found)


def with_tests(comparison: Comparison) -> Comparison:
    """Fill in p-values: significant for the first variant, not for the others."""
    first = comparison.variants[1]
    for cell in comparison.cells():
        if cell.difference is not None:
            p = 0.0004 if cell.variant == first else 0.4
            comparison._cells[cell.variant, cell.task] = replace(
                cell, p=p, p_holm=min(1.0, 2 * p), detectable=0.25
            )
    return comparison


def _item(
    info: TaskInfo, task: str, row: int, variant: int, generator: random.Random
) -> ItemResult:
    if info.metric == "perplexity":
        nll = 10 + variant + generator.random()
        return ItemResult(f"t{row}", {"nll": nll}, 5.0, f"text {row}")
    right = generator.random() < (0.9, 0.4, 0.7)[min(variant, 2)]
    prompt = f"{SHARED}Question {row}: what? {NASTY}" if task.startswith("task 0") else f"q {row}"
    output = f"answer {row}" if right else f"nothing {row}"
    return ItemResult(
        f"{row % 3}/{row}", {"accuracy": float(right)}, 1.0, prompt, f"answer {row}", output
    )
