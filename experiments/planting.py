"""Plant passages in a language model, then edit it: do known passages go before unknown ones?

Half of the passages of one source are planted (`lirefs.plant`), the other half are their twins,
which the model never sees: passages of nearly the same length, drawn by chance. Then the K-FAC
edit, SVD, random pairs and BalancedSubnet of the same matrices stand at the same rise in
perplexity, and planted passages and twins are recited and read under each. BalancedSubnet learns
from passages that are planted too and asked for by nobody.

    python -m experiments.planting --model smollm2-135m --passages FILE --field question

continues where it was stopped. `--arms free,flat,sharp,random` plants again with gradients
projected on half of the pairs (`kfac.projected_training`). The organism brings its own passages.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

import kfac
import lirefs
from experiments.write_flat import ARMS, halves
from lirefs import LanguageModel
from lirefs.comparison import Comparison
from lirefs.errors import SettingError, TaskError
from lirefs.files import atomic_write_text, parse_json, refuse_foreign
from lirefs.main_job.factors import edited_layers
from lirefs.main_job.matching import (
    Damage,
    Goal,
    Match,
    Rival,
    Scaled,
    rivals_of_edit,
    subnet_rival,
)
from lirefs.organism import Language, language_seed, training_texts
from lirefs.tasks import Perplexity, Recitation, Task, heldout_texts
from lirefs.tasks.texts import text_rows

TOKENS, SUFFIX = 64, 24
"""Passages are cut to so many tokens, the last of which are to be recited."""
RISES = (1.02, 1.1)
"""Perplexities of the edits, over that of the planted model."""
TOLD = 20
"""Further passages that are planted, for BalancedSubnet to learn from."""
GENERAL, MATCHING, ORDINARY = 400, 100, 60
"""Texts of an organism's language: mixed in, and of the curvature; matched on; reported on."""
PLANTED, TWINS = "planted passages", "twins"

Row = dict[str, Any]
"""A passage as `lirefs.recitation_task` takes it: an id, `prefix_ids` and `suffix_ids`."""


def passages(
    lm: LanguageModel, texts: Sequence[str], n: int, seed: int
) -> tuple[list[Row], list[Row]]:
    """N passages to plant and n twins: neighbours in length, of which one is drawn to be planted.

    Raises:
        TaskError: There are fewer than 2 n different texts of more than twice `SUFFIX` tokens.
    """
    rng, seen, rows = Random(f"passages {seed}"), set(), []
    for number, ids in enumerate(lm.encode(texts)):
        cut = ids[:TOKENS]
        start = tuple(cut[:-SUFFIX])
        if len(cut) > 2 * SUFFIX and start not in seen:
            seen.add(start)
            rows.append({"id": str(number), "prefix_ids": list(start), "suffix_ids": cut[-SUFFIX:]})
    if len(rows) < 2 * n:
        raise TaskError(
            f"{len(rows)} passages of more than {2 * SUFFIX} tokens; {2 * n} are needed"
        )
    chosen = sorted(rng.sample(rows, 2 * n), key=lambda row: len(row["prefix_ids"]))
    pairs = [rng.sample(chosen[i : i + 2], 2) for i in range(0, 2 * n, 2)]
    return [one for one, _ in pairs], [other for _, other in pairs]


@dataclass(frozen=True)
class Sources:
    """Texts by what they are for, none of them in two lists.

    Attributes:
        passages: Become passages and twins.
        mixed: General text for the training.
        curvature: What factors are collected from.
        matching: What perplexities are made equal on.
        ordinary: What perplexities are reported on.
    """

    passages: list[str]
    mixed: list[str]
    curvature: list[str]
    matching: list[str]
    ordinary: list[str]


def sources_for(model: str, path: Path | None, field: str) -> Sources:
    """The organism's stories; for other models a file of passages and English of the project."""
    taught = language_seed(model)
    if (taught is None) == (path is None):
        raise SettingError("--passages is needed, except for an organism, which writes its own")
    if taught is not None:
        language = Language(taught)
        stories = language.texts("train", GENERAL + ORDINARY)
        return Sources(
            language.texts("test", GENERAL), stories[:GENERAL],
            training_texts(language, GENERAL, seed=1), language.texts("validation", MATCHING),
            stories[GENERAL:],
        )  # fmt: skip
    rows = [row.fields for row in text_rows(str(path), "passages")]
    if missing := [row for row in rows if not isinstance(row.get(field), str)]:
        raise SettingError(f"{len(missing)} rows of {path} have no text {field!r}; see --field")
    english = lirefs.calibration_texts()
    return Sources(
        [str(row[field]) for row in rows], english[::2], english[1::2],
        *([text for _, text in heldout_texts(split)] for split in ("validation", "test")),
    )  # fmt: skip


def tasks_of(
    lm: LanguageModel, planted: Sequence[Row], twins: Sequence[Row], ordinary: Sequence[str]
) -> list[Task]:
    """Recitation of passages and of twins, the perplexity of each, and that of other text."""
    tasks: list[Task] = []
    for name, rows in ((PLANTED, planted), (TWINS, twins)):
        items = [(row["id"], row["prefix_ids"], row["suffix_ids"]) for row in rows]
        decode = partial(lm.tokenizer.decode, skip_special_tokens=True)
        texts = [(item, decode([*first, *rest])) for item, first, rest in items]
        tasks += [Recitation(name, items), Perplexity(f"perplexity of {name}", texts)]
    return [*tasks, Perplexity("perplexity of other text", list(ordinary))]


def plant(
    lm: LanguageModel,
    arm: str,
    planted: Sequence[Row],
    twins: Sequence[Row],
    sources: Sources,
    folder: Path,
    options: argparse.Namespace,
) -> lirefs.organism.Planted:
    """Plant the passages, training the MLP matrices alone, freely or on half of the pairs."""
    targets = kfac.find_targets(lm.model, projections="mlp")
    lm.model.requires_grad_(False)
    for target in targets:
        target.parameter.requires_grad_(True)
    projected: Any = nullcontext()
    if arm != "free":
        factors = collected(lm, sources.curvature, targets, folder.parent / "before.safetensors")
        projected = kfac.projected_training(
            lm.model, factors, halves(factors), onto=arm, seed=options.seed
        )
    with projected:
        return lirefs.plant(
            lm, planted, sources.mixed, twins, goal=options.goal, steps=options.steps,
            lr=options.lr, checkpoint=folder / "training.safetensors", seed=options.seed,
        )  # fmt: skip


def collected(
    lm: LanguageModel, texts: Sequence[str], targets: Sequence[kfac.Target], path: Path
) -> kfac.Factors:
    """Factors from a file, or collected now and kept there."""
    if path.exists():
        return kfac.Factors.load(path, model=lm.model)
    factors = kfac.collect(lm, list(texts), list(targets))
    factors.save(path)
    return factors


def matched(
    lm: LanguageModel, factors: kfac.Factors, sources: Sources, told: Sequence[Row], seed: int
) -> tuple[dict[str, Any], dict[str, Match]]:
    """The edit and its rivals at each rise in perplexity, and how each was set to it."""
    damage = Damage(lm, sources.matching)
    decode = partial(lm.tokenizer.decode, skip_special_tokens=True)
    forget = [str(decode([*row["prefix_ids"], *row["suffix_ids"]])) for row in told]
    edit = kfac.CurvatureEdit(factors, 1.0)
    others = rivals_of_edit(factors, factors.names, seed)
    rivals: dict[str, Rival] = {
        "K-FAC": Scaled(
            lambda removed: edit.with_keep(1 - removed), 1e-6, 0.7, lambda r: f"keep {1 - r:.5f}"
        )
    } | {name.partition(" at K-FAC")[0]: one for name, one in others.items()}
    clean = [str(decode(ids[:TOKENS])) for ids in lm.encode(sources.curvature)]
    rivals["BalancedSubnet"] = subnet_rival(lm, factors.names, clean, forget, seed)
    matches = {
        f"{name}, {rise - 1:+.0%}": rival.at(
            [Goal(one, rise * one.unchanged) for one in damage.stages]
        )
        for rise in RISES
        for name, rival in rivals.items()
    }
    return {name: one.intervention for name, one in matches.items()}, matches


def run_arm(arm: str, sources: Sources, options: argparse.Namespace) -> Row:
    """Plant, edit and compare in one arm; a finished one is read from its file."""
    folder = options.out / arm
    done = folder / "arm.json"
    if done.exists():
        return dict(parse_json(done.read_text("utf-8")))
    lm = lirefs.load(options.model)
    pairs = list(zip(*passages(lm, sources.passages, options.n + TOLD, options.seed), strict=True))
    Random(f"told {options.seed}").shuffle(pairs)
    told = [one for one, _ in pairs[options.n :]]
    planted, twins = map(list, zip(*pairs[: options.n], strict=True))
    record = plant(lm, arm, [*planted, *told], twins, sources, folder, options)
    print(f"{arm}: {record}")
    layers = options.layers
    if layers is None:
        layers = [0] if language_seed(options.model) is not None else edited_layers(lm, None)
    targets = kfac.find_targets(lm.model, layers, "mlp")
    factors = collected(lm, sources.curvature, targets, folder / "factors.safetensors")
    variants, matches = matched(lm, factors, sources, told, options.seed)
    comparison = lirefs.compare(
        lm, variants, tasks_of(lm, planted, twins, sources.ordinary), seed=options.seed,
        journal=folder / "journal", title=f"{options.n} passages planted: {arm}",
    )  # fmt: skip
    lirefs.write_report(comparison, folder / "report")
    found = {
        "planted": record.to_dict(),
        "settings": {
            name: {"setting": one.setting, "perplexity": one.reached, "equal": one.equal}
            for name, one in matches.items()
        },
        "cells": {variant: cells(comparison, variant) for variant in comparison.variants},
    }
    atomic_write_text(done, json.dumps(found, indent=1))
    return found


def cells(comparison: Comparison, variant: str) -> dict[str, Any]:
    """Score of each task under a variant, and its paired difference from the planted model."""
    found = {task: comparison.cell(variant, task) for task in comparison.tasks}
    return {
        task: {
            "value": one.value.to_dict(),
            "difference": None if one.difference is None else one.difference.to_dict(),
        }
        for task, one in found.items()
    }


def table(arms: Mapping[str, Row]) -> str:
    """The results as Markdown: what was planted, and what each method leaves of it."""
    lines = []
    for arm, found in arms.items():
        record = found["planted"]
        shares = [("planted", record["recited"]), ("twins", record["twins_recited"])]
        said = ", ".join(f"{name} {one['value']:.0%} of {one['n']}" for name, one in shares)
        change = record["general_change"]
        lines += [
            f"Planted ({arm}): {said} recited after {record['steps']} steps; loss of general text "
            f"{change['value']:+.3f} [{change['low']:+.3f}, {change['high']:+.3f}] nats per token"
            + ("" if record["reached"] else "; below the goal") + ".",
            "",
            "| | setting | " + " | ".join(found["cells"]["unchanged"]) + " |",
            "|---" * (2 + len(found["cells"]["unchanged"])) + "|",
        ]  # fmt: skip
        for variant, each in found["cells"].items():
            setting = found["settings"].get(variant, {"setting": "", "equal": True})
            words = setting["setting"] + ("" if setting["equal"] else " (not equal)")
            lines.append(f"| {variant} | {words} | " + " | ".join(map(shown, each.values())) + " |")
        lines.append("")
    return "\n".join(lines)


def shown(cell: Row) -> str:
    """A score with its interval: a share in percent, or a perplexity."""
    one = cell["value"]
    scale, digits = (100, 0) if one["high"] <= 1 else (1, 2)
    value, low, high = (f"{scale * one[key]:.{digits}f}" for key in ("value", "low", "high"))
    return f"{value} [{low}, {high}]"


def run(options: argparse.Namespace) -> dict[str, Row]:
    """Run or continue the experiment in a folder; its results, which are also written there."""
    names = ("model", "n", "goal", "steps", "lr", "seed", "field")
    settings = {name: getattr(options, name) for name in names}
    settings |= {"passages": str(options.passages), "layers": options.layers}
    known = options.out / "settings.json"
    refuse_foreign(known, '"passages"', ("results.json", "table.md"))
    if known.exists() and parse_json(known.read_text("utf-8")) != settings:
        raise SettingError(f"{options.out} holds a run with other settings; give another --out")
    sources = sources_for(options.model, options.passages, options.field)
    atomic_write_text(known, json.dumps(settings))
    arms = {arm: run_arm(arm, sources, options) for arm in options.arms}
    atomic_write_text(options.out / "results.json", json.dumps(arms, indent=1))
    atomic_write_text(options.out / "table.md", table(arms))
    return arms


def arms_named(text: str) -> list[str]:
    """The arms of a list with commas."""
    arms = text.split(",")
    if not set(arms) <= set(ARMS):
        raise argparse.ArgumentTypeError(f"{text!r}: arms are {', '.join(ARMS)}")
    return arms


def main() -> None:
    """Parse the arguments, run, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2-135m", help="built-in name, folder or hub id")
    parser.add_argument("--passages", type=Path, help="texts of one source: JSON Lines or a folder")
    parser.add_argument("--field", default="text", help="field of the rows that holds the text")
    parser.add_argument("--n", type=int, default=60, help="passages to plant, and twins")
    parser.add_argument("--arms", type=arms_named, default=["free"], help=f"of {', '.join(ARMS)}")
    parser.add_argument("--layers", type=int, nargs="+", help="layers whose MLPs are edited")
    parser.add_argument("--goal", type=float, default=0.95, help="share of passages to recite")
    parser.add_argument("--steps", type=int, default=400, help="most steps of training")
    parser.add_argument("--lr", type=float, default=2e-4, help="AdamW's learning rate")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("planting"), help="folder of the results")
    options = parser.parse_args()
    run(options)
    print((options.out / "table.md").read_text("utf-8"))


if __name__ == "__main__":
    main()
