"""Recitation against perplexity and against each task group, for every weight-editing method.

Each method runs at a few strengths, all on the same items. Nominal strengths of different methods
cannot be compared, so bisection finds those that raise the perplexity of validation texts by given
factors, the same for every method. BalancedSubnet runs at two fixed shares.

    python benchmarks/pareto.py --model organism --layers 0,1,2,3

writes pareto.json, a figure of recitation against perplexity, and one figure for each task group.
"""

from __future__ import annotations

import argparse
import inspect
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import kfac
import lirefs
from lirefs.files import atomic_write_text, refuse_foreign
from lirefs.main_job.matching import perplexity
from lirefs.organism import Language, language_seed, organism_tasks, training_texts
from lirefs.tasks import Recitation, calibration_texts, heldout_texts
from lirefs.tasks.task import GROUPS

BISECTIONS = 12
ENOUGH = 0.1
"""A search ends at this distance from the wanted rise in perplexity, as a share of that rise."""
SUBNET = "BalancedSubnet"


def main() -> None:
    """Parse the arguments, run, and write the results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument(
        "--layers", default=None, help="e.g. 20,21,22; default: three from 2/3 of the depth"
    )
    parser.add_argument("--memorized", default=None, help="JSON Lines of memorized texts")
    parser.add_argument(
        "--factors", type=Path, default=None, help="file to keep the factors in and reuse"
    )
    parser.add_argument(
        "--rises", default=None, help="factors of perplexity; default: 1.05,1.15,1.3,1.6"
    )
    parser.add_argument("--methods", default=None, help="comma-separated; default: all")
    parser.add_argument("--out", type=Path, default=Path("pareto"))
    parser.add_argument("--limit", type=int, default=None, help="items per task")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="14 items per task, two strengths")
    options = parser.parse_args()
    if options.quick:
        options.limit = options.limit or 14
    options.rises = options.rises or ("1.1,1.4" if options.quick else "1.05,1.15,1.3,1.6")
    figures = [f"{name}.{kind}" for name in ("perplexity", *GROUPS) for kind in ("png", "svg")]
    refuse_foreign(options.out / "pareto.json", '"rows"', figures)
    began = time.perf_counter()
    lm = lirefs.load(options.model)
    start = round(lm.n_layers * 2 / 3)
    layers = (
        list(range(start, min(start + 3, lm.n_layers)))
        if options.layers is None
        else [int(x) for x in options.layers.split(",")]
    )
    tasks, calibration, validation, forget = material(lm, options)
    factors = load_or_collect(lm, layers, calibration, options)
    methods = make_methods(factors, options.seed)
    wanted = options.methods.split(",") if options.methods else [*methods, SUBNET]

    ids = lm.encode(validation[: 10 if options.quick else None])
    unchanged = perplexity(lm, ids, None)
    variants: dict[str, Any] = {}
    settings: dict[str, dict[str, Any]] = {}
    if SUBNET in wanted:
        for ratio, edit in subnets(lm, factors, calibration, forget, options).items():
            name, reached = f"{SUBNET}, {ratio:.2%} pruned", perplexity(lm, ids, edit)
            variants[name] = edit
            settings[name] = {"method": SUBNET, "strength": 1 - ratio, "validation": reached}
    for method in (name for name in wanted if name != SUBNET):
        make = methods[method]
        for rise in (float(x) for x in options.rises.split(",")):
            strength, reached, edit = match(lm, ids, make, rise * unchanged)
            name = f"{method}, x{rise:g}"
            print(f"{name}: strength {strength:.4f}, perplexity {reached:.2f}", flush=True)
            if abs(reached / unchanged - rise) > 0.3 * (rise - 1):
                print(f"{name}: left out, its perplexity cannot be matched", flush=True)
                continue
            variants[name] = edit
            settings[name] = {"method": method, "strength": strength, "validation": reached}
    comparison = lirefs.compare(lm, variants, tasks, seed=options.seed)
    write(options.out, comparison, settings, layers, factors)
    print(f"wrote {options.out} after {time.perf_counter() - began:.0f} s")


def material(
    lm: lirefs.LanguageModel, options: Any
) -> tuple[list[Any], list[str], list[str], list[list[int]]]:
    """Return tasks, texts for curvature, texts for matching perplexity, and ids for BalancedSubnet.

    BalancedSubnet learns what to forget, and is never tested on what it learned from. On the
    organism it gets the planted sequences of the train split; elsewhere it gets every second
    memorized text, and the task keeps the others. `limit` does not limit the memorized texts.
    """
    taught = language_seed(options.model)
    if taught is not None:
        language = Language(taught)
        tasks = organism_tasks(lm, language, "test", options.limit or 80)
        planted = [item.text for item in language.items("planted", "train")]
        texts = language.texts("validation", 60)
        return tasks, training_texts(language, 1500, options.seed), texts, lm.encode(planted)
    split = lirefs.load_questions().split(seed=options.seed)
    tasks = lirefs.default_tasks(lm, split.test, options.memorized, limit=options.limit)
    place = next(i for i, task in enumerate(tasks) if task.group == "memorization")
    recited = lirefs.default_tasks(lm, split.test, options.memorized)[place]
    assert isinstance(recited, Recitation)
    forget: list[list[int]] = []
    if options.methods is None or SUBNET in options.methods.split(","):
        forget = [[*prefix, *suffix] for _, prefix, suffix in recited.items[::2]]
        recited = Recitation(recited.name, recited.items[1::2])
    tasks[place] = recited
    texts = [text for _, text in heldout_texts("validation")]
    return tasks, calibration_texts(), texts, forget


def load_or_collect(
    lm: lirefs.LanguageModel, layers: list[int], calibration: list[str], options: Any
) -> kfac.Factors:
    """Factors with every estimator that the methods need."""
    if options.factors is not None and options.factors.exists():
        return kfac.Factors.load(options.factors, model=lm.model)
    texts = calibration[: 40 if options.quick else None]
    factors = kfac.collect(lm, texts, layers=layers, seed=options.seed, marginals=True)
    factors = kfac.correct(lm, texts, factors, seed=options.seed)
    if options.factors is not None:
        factors.save(options.factors)
    return factors


def make_methods(factors: kfac.Factors, seed: int) -> dict[str, Callable[[float], Any]]:
    """For each method, a function from strength (1: unchanged, 0: all removed) to an edit."""
    return {
        "K-FAC": kfac.CurvatureEdit(factors, 1.0).with_keep,
        "EK-FAC": kfac.CurvatureEdit(factors, 1.0, estimator="ekfac").with_keep,
        "marginals": kfac.CurvatureEdit(factors, 1.0, estimator="marginal").with_keep,
        "output side": kfac.CurvatureEdit(factors, 1.0, shape="output").with_keep,
        "SVD": kfac.SVDEdit(factors.names, 1.0).with_keep,
        "random pairs": lambda keep: kfac.RandomPairsEdit(factors, keep, seed=seed),
    }


def subnets(
    lm: lirefs.LanguageModel,
    factors: kfac.Factors,
    calibration: list[str],
    forget: list[list[int]],
    options: Any,
) -> dict[float, Any]:
    """BalancedSubnet at two shares of pruned weights: the paper's, and twenty times as much.

    Each share needs its own training, so no search as for other strengths.
    """
    retain = lm.encode(calibration[: len(forget)])
    clean, memorized = (
        [lm.pad(rows[i : i + 8], side="right") for i in range(0, len(rows), 8)]
        for rows in (retain, forget)
    )
    targets = kfac.named_targets(lm.model, factors.names)
    paper = inspect.signature(kfac.fit_balanced_subnet).parameters["ratio"].default
    return {
        ratio: kfac.fit_balanced_subnet(
            lm.model,
            clean,
            memorized,
            targets,
            ratio=ratio,
            seed=options.seed,
            progress=False,
        )
        for ratio in (paper, 20 * paper)
    }


def match(
    lm: lirefs.LanguageModel, ids: list[list[int]], make: Callable[[float], Any], goal: float
) -> tuple[float, float, Any]:
    """Return the strength whose perplexity is nearest to the goal, its perplexity, and its edit."""
    low, high = 0.0, 1.0
    unchanged = perplexity(lm, ids, None)
    best: tuple[float, float, Any] = (1.0, unchanged, None)
    for _ in range(BISECTIONS):
        if abs(best[1] - goal) < ENOUGH * (goal - unchanged):
            break
        middle = (low + high) / 2
        edit = make(middle)
        reached = perplexity(lm, ids, edit)
        if abs(reached - goal) < abs(best[1] - goal) and edit is not None:
            best = (middle, reached, edit)
        if reached > goal:
            low = middle
        else:
            high = middle
    return best


def write(
    out: Path,
    comparison: lirefs.Comparison,
    settings: dict[str, Any],
    layers: list[int],
    factors: kfac.Factors,
) -> None:
    """Write the numbers, the figure for perplexity and the figure for each task group."""
    summary = comparison.summary()
    recited = next(t for t, info in comparison.tasks.items() if info.group == "memorization")
    language = next(t for t, info in comparison.tasks.items() if info.group == "language")

    def value(variant: str, task: str) -> kfac.Estimate:
        one = summary.cells[variant, task].value
        return kfac.Estimate(one.value, one.low, one.high, one.n)

    def retained(variant: str, group: str) -> kfac.Estimate:
        one = summary.means[variant, group]
        return kfac.Estimate(one.value, one.low, one.high, one.n)

    methods = list(dict.fromkeys(one["method"] for one in settings.values()))
    n = value("unchanged", recited).n
    by_method = {m: [v for v, one in settings.items() if one["method"] == m] for m in methods}
    curves = {
        m: [(value(v, language), value(v, recited)) for v in names]
        for m, names in by_method.items()
    }
    start = (value("unchanged", language), value("unchanged", recited))
    label = f"share recited, n = {n}"
    figure = kfac.figures.pareto_figure(curves, "perplexity of held-out texts", label, start)
    figure.save(out, "perplexity")
    for group, counted in summary.groups.items():
        if group in ("memorization", "language") or not counted:
            continue
        curves = {
            m: [(retained(v, group), value(v, recited)) for v in names]
            for m, names in by_method.items()
        }
        one = kfac.Estimate(1.0, 1.0, 1.0, 0)
        figure = kfac.figures.pareto_figure(
            curves, f"{group}: share of the unchanged model", label, (one, start[1])
        )
        figure.save(out, group)
    rows = []
    for variant in comparison.variants:
        row: dict[str, Any] = {"variant": variant, **settings.get(variant, {})}
        row["perplexity"] = vars(value(variant, language))
        row["recited"] = vars(value(variant, recited))
        if variant != "unchanged":
            row["retained"] = {group: vars(retained(variant, group)) for group in summary.groups}
        rows.append(row)
    record = {
        "model": comparison.provenance["model_name"],
        "layers": layers,
        "factors": factors.digest,
        "tokens": factors.tokens,
        "torch": torch.__version__,
        "rows": rows,
    }
    atomic_write_text(out / "pareto.json", json.dumps(record, indent=1))


if __name__ == "__main__":
    main()
