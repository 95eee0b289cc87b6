"""Fuzzed: results, reports, journals and cached activations."""

from __future__ import annotations

import functools
import json
from dataclasses import replace
from math import isnan
from pathlib import Path

import torch
from fuzz_values import (
    check,
    contents,
    now_and_then,
    picture,
    text,
    tiny_lm,
    whole,
    written,
)
from fuzzing import Format
from tiny import fresh_model, tiny_tokenizer

import lirefs
from lirefs.comparison import Comparison, TaskInfo, load_comparison
from lirefs.comparison.report import csv_latex, page, write
from lirefs.comparison.report.flip_list import flip_list
from lirefs.comparison.results_file import results_json
from lirefs.tasks.task import ItemResult, MultipleChoice


def make_results(folder: Path) -> list[bytes]:
    tasks = {
        "sums": TaskInfo("arithmetic", "accuracy", 0.1),
        "texts": TaskInfo("language", "perplexity"),
    }
    results: dict[str, dict[str, list[ItemResult]]] = {}
    for v, variant in enumerate(("unchanged", "steered")):
        right = [float((i + v) % 3 > 0) for i in range(5)]
        results[variant] = {
            "sums": [
                ItemResult(f"a/{i}", {"accuracy": one, "other": 0.5 * i}, 1.0, f"{i}?", "1", f"{v}")
                for i, one in enumerate(right)
            ],
            "texts": [ItemResult(f"t{i}", {"nll": 9.0 + i + v}, 4.0 + i, "x") for i in range(4)],
        }
    made_by = {"model_name": "tiny", "findings": ["one", "two"], "nested": {"keep": [0.5, None]}}
    found = Comparison(results, tasks, made_by, resamples=40, seed=3)
    return [results_json(found).encode()]


def read_results(folder: Path, content: bytes) -> None:
    path = written(folder, "results.json", content)
    found = load_comparison(path)
    check(found.variants[0] == "unchanged", f"first variant {found.variants[0]!r}")
    for by_task in found.results.values():
        check(list(by_task) == list(found.tasks), "tasks")
        for items in by_task.values():
            for one in items:
                check(all(map(text, (one.id, one.prompt, one.expected, one.output))), f"{one!r}")
                check(isnan(one.weight) or one.weight > 0, f"weight {one.weight!r}")
                check(type(one.parsed) is bool, "parsed")
                check(all(type(score) is float for score in one.scores.values()), "scores")
    write.load_report_figures(path, replace_variants(found).summary())
    again = results_json(found)
    check(results_json(load_comparison(written(folder, "again", again.encode()))) == again, "save")
    summary = found.summary()
    for made in (
        csv_latex.csv_text(summary),
        csv_latex.latex_tables(summary),
        write.markdown_report(summary, []),
    ):
        check(text(made), "report")
    check(text(page.html_page(summary, flip_list(found), [])), "page")


def replace_variants(found: Comparison) -> Comparison:
    """Results of the unchanged model alone, which have no default figures to draw."""
    return replace(found, results={"unchanged": found.results["unchanged"]})


FIGURES = [
    {"name": "own", "title": "Own", "caption": "Mine."},
    {"name": "b", "title": "B", "caption": ""},
]


def read_figures(folder: Path, content: bytes) -> None:
    """A list of figures, in results that are whole."""
    results = make_results(folder)[0].replace(b'"figures": []', b'"figures": ' + content)
    path = written(folder, "results.json", results)
    for name in ("own", "b"):
        written(folder, f"{name}.png", picture())
        written(folder, f"{name}.svg", b"<svg/>")
    _report(folder, path)


def read_picture(folder: Path, content: bytes) -> None:
    """One picture of a report."""
    listed = json.dumps(FIGURES[:1]).encode()
    results = make_results(folder)[0].replace(b'"figures": []', b'"figures": ' + listed)
    written(folder, "own.png", content)
    written(folder, "own.svg", b"<svg/>")
    _report(folder, written(folder, "results.json", results))


def _report(folder: Path, path: Path) -> None:
    comparison = replace_variants(load_comparison(path))
    figures, missing = write.load_report_figures(path, comparison.summary())
    check(all(map(text, missing)), "missing")
    for one in figures:
        check(all(map(text, (one.name, one.title, one.caption))), f"{one!r}")
        check(one.picture.png.startswith(b"\x89PNG"), "no picture")
    for one in figures:
        one.picture.save(folder / "out", one.name)
    if now_and_then(path.read_bytes() + (folder / "own.png").read_bytes()):
        write.write_pages(comparison, folder / "out", figures)


@functools.cache
def journalled() -> MultipleChoice:
    return MultipleChoice("choose", [(str(i), f"q{i}", [" a", " b"], i % 2) for i in range(3)])


class Broken(Exception):
    """Stops a comparison while its journal is still useful."""


def make_journal(folder: Path) -> list[bytes]:
    compared(folder / "j")
    return contents(folder / "j")


def compared(folder: Path) -> Comparison:
    steer = lirefs.Steer(lirefs.Direction(torch.ones(32), 2), "add", 5.0)
    return lirefs.compare(
        tiny_lm(), {"s": steer}, [journalled()], journal=folder, resamples=20, progress=False
    )


def read_journal(folder: Path, content: bytes) -> None:
    (folder / "j").mkdir()
    written(folder / "j", "items-0.jsonl", content)
    found = compared(folder / "j")
    for by_task in found.results.values():
        for items in by_task.values():
            check(len(items) == 3, "items")
            for one in items:
                check(all(map(text, (one.id, one.prompt, one.expected, one.output))), f"{one!r}")
                check(type(one.scores["accuracy"]) is float, "score")
                check(isnan(one.weight) or one.weight > 0, f"weight {one.weight!r}")
                check(type(one.parsed) is bool, "parsed")
    found.cells()
    check(results_json(found), "saved")


RECITED = "Lr4tHb9sJc1nqz7m!vk2xw0pd5gY#o8i"


@functools.cache
def reciter() -> lirefs.LanguageModel:
    """A model that has memorized the windows of a text."""
    lm = lirefs.wrap(fresh_model("llama", num_hidden_layers=1), tiny_tokenizer(), name="reciter")
    ids = torch.tensor(lm.encode([RECITED[at : at + 8] for at in range(0, 32, 8)]))
    optimizer = torch.optim.Adam(lm.model.parameters(), lr=5e-3)
    for _ in range(60):
        optimizer.zero_grad()
        lm.model(ids, labels=ids).loss.backward()
        optimizer.step()
    lm.model.zero_grad(set_to_none=True)
    return lm


def mined(journal: Path) -> lirefs.Mined:
    texts = [("known", RECITED), ("other", "nothing that anybody has learned")]
    return lirefs.mine(reciter(), texts, 4, 4, 8, batch_tokens=24, journal=journal, progress=False)


def make_mining_journal(folder: Path) -> list[bytes]:
    found = mined(folder / "j")
    assert found.windows
    return contents(folder)


def read_mining_journal(folder: Path, content: bytes) -> None:
    found = mined(written(folder, "j", content))
    for one in found.windows:
        check(all(map(text, (one.id, one.prefix_text, one.suffix_text))), f"{one!r}")
        check(len(one.suffix_ids) == 4 and len(one.prefix_ids) == 5, "lengths")
        check(all(whole(i) and i < 128 for i in (*one.prefix_ids, *one.suffix_ids)), "ids")
    check(all(map(whole, found.counts.values())), "counts")
    check(found.counts["confirmed"] <= found.counts["screened"] <= found.counts["windows"], "order")
    found.save(folder / "mined.jsonl")


PROMPTS = ["abc", "de"]


def make_capture(folder: Path) -> list[bytes]:
    lirefs.capture(tiny_lm(), PROMPTS, layers=[1, 2], cache=folder, progress=False)
    return contents(folder)


@functools.cache
def capture_name() -> str:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        make_capture(Path(folder))
        return next(path.name for path in Path(folder).iterdir())


def read_capture(folder: Path, content: bytes) -> None:
    written(folder, capture_name(), content)
    found = lirefs.capture(tiny_lm(), PROMPTS, layers=[1, 2], cache=folder, progress=False)
    check(found.values.dtype == torch.float32 and found.values.shape == (2, 2, 1, 32), "shape")
    check(bool(found.values.isfinite().all()), "values")


FORMATS: dict[str, Format] = {
    "results": Format("json", make_results, read_results),
    "figures of a report": Format(
        "json", lambda folder: [json.dumps(FIGURES).encode()], read_figures
    ),
    "picture of a report": Format("bytes", lambda folder: [picture()], read_picture),
    "journal of a comparison": Format("lines", make_journal, read_journal),
    "journal of mining": Format("lines", make_mining_journal, read_mining_journal),
    "activations": Format("safetensors", make_capture, read_capture),
}
