"""Analyses of the K-FAC paper on a model and its factors: bands, detector, relearning."""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from rich.console import Console
from rich.table import Table

import kfac
import lirefs
from lirefs.cli.inputs import load_with_factors, texts_of
from lirefs.cli.options import (
    DEFAULT_MODEL,
    Device,
    FactorsFile,
    Keep,
    Model,
    OutFolder,
    Seed,
    console,
    indices,
)
from lirefs.errors import SettingError
from lirefs.files import atomic_write_text, read_jsonl
from lirefs.statistics.intervals import areas
from lirefs.tasks import suite

CLASSES = {"clean": 0, "memorized": 1}


Memorized = Annotated[
    Path | None, typer.Option(help="Memorized texts (JSON Lines); default: the project's own.")
]


def bands(
    factors: FactorsFile,
    out: OutFolder,
    model: Model = DEFAULT_MODEL,
    device: Device = None,
    memorized: Memorized = None,
    clean: Annotated[
        Path | None, typer.Option(help="Clean texts (JSON Lines); default: the project's own.")
    ] = None,
    seed: Seed = 0,
) -> None:
    """Compare how memorized and clean texts activate each curvature band.

    Memorized texts that the model does not recite are left out.
    """
    ordinary = [t for _, t in suite.heldout_texts("test")] if clean is None else texts_of(clean)
    lm, known = load_with_factors(model, device, factors)
    recited = _recited(lm, memorized, 2, "to compare them with clean ones")
    sets = [[[*prefix, *suffix] for _, prefix, suffix in recited], lm.encode(ordinary)]
    first, second = (kfac.band_profile(lm.model, lm.batches(ids), known) for ids in sets)
    ratios = kfac.band_ratios(first, second, seed=seed)
    layers = [target.layer for target in known.targets(lm.model, ratios.names)]
    places = [layer for layer in layers if layer is not None]
    distinct = len(set(places)) == len(layers)
    kfac.figures.bands(ratios, places if distinct else None).save(out, "bands")
    _write_json(
        out / "bands.json",
        {
            "targets": ratios.names,
            "bands": ratios.labels,
            "texts": ratios.n,
            "ratio": ratios.ratio.tolist(),
            "control": ratios.control.tolist(),
            "factors": known.digest,
        },
    )
    table = Table("input of", *ratios.labels, title="memorized over clean [95 % interval]")
    for place, name in enumerate(ratios.names):
        cells = ratios.ratio[:, place].T
        table.add_row(name, *(f"{v:.2f} [{a:.2f}, {b:.2f}]" for v, a, b in cells))
    Console().print(table)
    console.print(f"figure: {out / 'bands.png'}", markup=False, soft_wrap=True)


def detect(
    factors: FactorsFile,
    out: OutFolder,
    model: Model = DEFAULT_MODEL,
    device: Device = None,
    texts: Annotated[
        Path | None,
        typer.Option(
            help="JSON Lines with `text` and, to measure the detector, `label` (memorized, clean); "
            "default: the project's passages that the model recites, and held-out texts."
        ),
    ] = None,
    flat: Annotated[
        float, typer.Option(help="Share of input directions that count as flat.")
    ] = 0.6,
    seed: Seed = 0,
) -> None:
    """Score texts by how much of them lies in flat directions: recited ones score high."""
    rows = _detector_rows() if texts is None else [row for _, row in read_jsonl(texts)]
    for number, row in enumerate(rows, start=1):
        # A list of the names: a label that cannot be hashed is compared as well.
        if not isinstance(row.get("text"), str) or row.get("label", "clean") not in list(CLASSES):
            raise SettingError(
                f"--texts, row {number}: needs `text`, and a `label` only of {' or '.join(CLASSES)}"
            )
    lm, known = load_with_factors(model, device, factors)
    if texts is None:
        recited = {key for key, _, _ in _recited(lm, None, 0)}
        rows = [row for row in rows if row["label"] == "clean" or str(row["id"]) in recited]
    ids = lm.encode([row["text"] for row in rows])
    scores = kfac.score_recitation(lm.model, lm.batches(ids), known, flat=flat)
    lines: list[dict[str, Any]] = []
    for index, row in enumerate(rows):
        words = [lm.tokenizer.decode([token]) for token in ids[index]]
        lines.append(
            {
                "id": str(row.get("id", index)),
                "label": row.get("label"),
                "score": float(scores.passages[index]),
                "tokens": [
                    [word, round(float(value), 5)]
                    for word, value in zip(words, scores.tokens[index], strict=True)
                ],
            }
        )
    atomic_write_text(
        out / "scores.jsonl", "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    )
    labelled = [line for line in lines if line["label"] is not None]
    labels = np.array([CLASSES[line["label"]] for line in labelled])
    if len(set(labels.tolist())) == 2:
        values = np.array([line["score"] for line in labelled])
        by_text = kfac.auroc(values, labels, seed=seed)
        # Tokens of a text depend on each other: no interval.
        tokens = np.array([score for line in labelled for _, score in line["tokens"]])
        by_token = float(areas(tokens, labels.repeat([len(line["tokens"]) for line in labelled])))
        kfac.figures.detector(values, labels).save(out, "detector")
        _write_json(
            out / "detector.json",
            {
                "auroc": vars(by_text),
                "token_auroc": by_token,
                "flat": flat,
                "factors": known.digest,
            },
        )
        typer.echo(f"AUROC by text {by_text}, n = {by_text.n}; by token {by_token:.3f}")
    console.print(f"scores: {out / 'scores.jsonl'}", markup=False, soft_wrap=True)


def relearn(
    factors: FactorsFile,
    out: OutFolder,
    model: Model = DEFAULT_MODEL,
    device: Device = None,
    keep: Keep = 0.8,
    memorized: Memorized = None,
    steps: Annotated[str, typer.Option(help="When to test.")] = "0,1,2,5,10,20",
    lr: Annotated[float, typer.Option(help="Learning rate of the fine-tuning.")] = 1e-5,
    seed: Seed = 0,
) -> None:
    """Fine-tune the edited model on half of what it recited, and test the other half."""
    points = indices(steps, "--steps") or [0]
    lm, known = load_with_factors(model, device, factors)
    change = kfac.CurvatureEdit(known, keep)
    recited = _recited(lm, memorized, 4, "half to train on and half to test")
    generator = torch.Generator().manual_seed(seed)
    mixed = [recited[i] for i in torch.randperm(len(recited), generator=generator).tolist()]
    half = len(mixed) // 2
    batches = [_labelled(lm, prefix, suffix) for _, prefix, suffix in mixed]
    unrelated = lm.encode([text for _, text in suite.heldout_texts("validation")])
    result = kfac.relearn(
        lm.model,
        {"edited": change, "never edited": None},
        batches[:half],
        batches[half:],
        other=_cut_alike(lm, unrelated, mixed[:half]),
        steps=points,
        lr=lr,
        seed=seed,
    )
    kfac.figures.relearning(result).save(out, "relearning")
    arms = {
        arm: {"known": [vars(v) for v in result.known[arm]], "rest": [vars(v) for v in values]}
        for arm, values in result.rest.items()
    }
    _write_json(
        out / "relearning.json",
        {"steps": result.steps, "arms": arms, "lr": lr, "edit": change.describe()},
    )
    table = Table("arm", *(f"{step} steps" for step in result.steps), title="other half recited")
    for arm, values in result.rest.items():
        table.add_row(arm, *(f"{value.value:.0%}" for value in values))
    Console().print(table)
    console.print(f"figure: {out / 'relearning.png'}", markup=False, soft_wrap=True)


def _labelled(
    lm: lirefs.LanguageModel, prefix: Sequence[int], suffix: Sequence[int]
) -> dict[str, Any]:
    batch: dict[str, Any] = dict(lm.pad([[*prefix, *suffix]], side="right"))
    labels = batch["input_ids"].clone()
    labels[:, : len(prefix)] = -100
    return batch | {"labels": labels}


def _recited(
    lm: lirefs.LanguageModel, path: Path | None, least: int, purpose: str = ""
) -> list[tuple[str, Sequence[int], Sequence[int]]]:
    """Return (id, prefix, suffix) of the memorized texts that the model recites, and say how many.

    Raises:
        SettingError: There are fewer than `least`.
    """
    items = lirefs.recitation_task(lm, path or suite.DATA / "passages.jsonl").items
    batches = [_labelled(lm, prefix, suffix) for _, prefix, suffix in items]
    flags = kfac.recitation(lm.model.eval(), batches).bool().tolist()
    recited = [item for item, yes in zip(items, flags, strict=True) if yes]
    found = f"the unchanged model recites {len(recited)} of {len(items)} memorized texts"
    if len(recited) < least:
        raise SettingError(f"{found}; at least {least} are needed, {purpose}")
    console.print(found, markup=False)
    return recited


def _cut_alike(
    lm: lirefs.LanguageModel,
    texts: Sequence[Sequence[int]],
    items: Sequence[tuple[str, Sequence[int], Sequence[int]]],
) -> list[dict[str, Any]]:
    """Return a batch for each text, cut and labelled like one of the items.

    Training on one or the other then differs in what is read, not in how much a step reads.
    """
    batches = []
    for text, (_, prefix, suffix) in zip(texts, itertools.cycle(items), strict=False):
        start = min(len(prefix), len(text) - 1)
        batches.append(_labelled(lm, text[:start], text[start : start + len(suffix)]))
    return batches


def _detector_rows() -> list[dict[str, Any]]:
    passages = [row for _, row in read_jsonl(suite.DATA / "passages.jsonl")]
    rows = [{"id": row["id"], "text": row["text"], "label": "memorized"} for row in passages]
    held_out = suite.heldout_texts("test")
    return rows + [{"id": key, "text": text, "label": "clean"} for key, text in held_out]


def _write_json(path: Path, value: dict[str, Any]) -> None:
    atomic_write_text(path, json.dumps(value, indent=1))
