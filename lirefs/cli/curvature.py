"""`lirefs curvature`: collect factors, edit weights by them, and the K-FAC paper's analyses."""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from rich.console import Console
from typer import Option

import kfac
import lirefs
from lirefs.cli import options
from lirefs.cli.options import DEFAULT_MODEL, Device, FactorsFile, Keep, Model, OutFolder, Seed
from lirefs.errors import SettingError
from lirefs.files import atomic_write_text, read_jsonl, usual_file_permissions, write_errors
from lirefs.main_job.settings import console_table
from lirefs.statistics.intervals import roc_areas
from lirefs.tasks.default_suite import DATA, calibration_texts, heldout_texts

ESTIMATORS = ("kfac", "marginal", "diagonal", "ekfac")
CLASSES = {"clean": 0, "memorized": 1}
Passage = tuple[str, Sequence[int], Sequence[int]]
"""Id, prefix and suffix of a memorized text, the latter two as token ids."""
Memorized = Annotated[
    Path | None, Option(help="Memorized texts (JSON Lines); default: the project's own.")
]

app = typer.Typer(no_args_is_help=True, help="Curvature of the weights, and edits by it.")


@app.command("collect")
def collect_command(
    out: Annotated[Path, Option(help="Factors file to write.", callback=options.file_to_write)],
    model: Model = DEFAULT_MODEL,
    device: Device = None,
    texts: Annotated[
        Path | None, Option(help="Texts (JSON Lines with `text`); default: the project's.")
    ] = None,
    layers: Annotated[str | None, Option(help="Layers, e.g. 20,21,22.")] = None,
    projections: Annotated[
        str, Option(help="mlp_in, mlp_out, mlp, or name endings: gate_proj,q_proj.")
    ] = "mlp_in",
    estimators: Annotated[
        str, Option(help="kfac, and any of marginal, diagonal, ekfac (a second pass).")
    ] = "kfac",
    samples: Annotated[int, Option(min=1, help="Sampled labels for each position.")] = 1,
    budget: Annotated[
        float | None, Option(help="Memory for sums in GiB; more passes if they do not fit.")
    ] = None,
    seed: Seed = 0,
) -> None:
    """Collect the factors of a model over texts; an interrupted run continues where it stopped."""
    wanted = [part.strip() for part in estimators.split(",")]
    for name in wanted:
        options.choice_option(name, "--estimators", ESTIMATORS)
    if budget is not None and not 0 < budget < math.inf:
        raise SettingError(f"--budget {budget}: must be above 0 GiB")
    chosen = options.indices_option(layers)
    rows = calibration_texts() if texts is None else _texts_of(texts)
    lm = lirefs.load(model, device=device)
    group = projections.strip() in ("mlp_in", "mlp_out", "mlp")
    roles = projections.strip() if group else projections.split(",")
    targets = kfac.find_targets(lm.model, chosen, roles)
    room = None if budget is None else int(budget * 2**30)
    settings: dict[str, Any] = {"seed": seed, "samples": samples, "budget": room}
    provenance = {
        "data": hashlib.sha256(repr(lm.encode(rows)).encode()).hexdigest(),
        "model": lm.fingerprint,
        "tokenizer": lm.tokenizer_fingerprint,
        "lirefs": lirefs.__version__,
    }
    states = [out.with_name(out.name + end) for end in (".checkpoint", ".ekfac-checkpoint")]
    factors = kfac.collect(
        lm,
        rows,
        targets,
        marginals="marginal" in wanted,
        diagonal="diagonal" in wanted,
        checkpoint=states[0],
        provenance=provenance,
        **settings,
    )
    if "ekfac" in wanted:
        factors = kfac.correct(lm, rows, factors, checkpoint=states[1], **settings)
    factors.save(out)
    for state in states:
        state.unlink(missing_ok=True)
    options.say_on_console(f"{factors}: {out}")


@app.command("edit")
def edit_command(
    factors: FactorsFile,
    out: Annotated[
        Path,
        Option(help="Folder for the edited model; must be new.", callback=options.new_folder),
    ],
    model: Model = DEFAULT_MODEL,
    device: Device = None,
    keep: Keep = 0.8,
    estimator: Annotated[
        str, Option(help="kfac, ekfac, marginal, input, output or diagonal.")
    ] = "kfac",
    shape: Annotated[str, Option(help="pairs, rectangle, output or input.")] = "pairs",
    saliency: Annotated[
        bool, Option("--saliency", help="Rank by mass times squared coordinate.")
    ] = False,
) -> None:
    """Edit a model and save it in a folder that transformers loads without this package."""
    lm, known = _load(model, device, factors)
    change = kfac.CurvatureEdit(known, keep, estimator=estimator, shape=shape, saliency=saliency)
    reports = change.report(lm.model)
    change.bake(lm.model)
    with write_errors(out):
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".tmp-", dir=out.parent) as folder:
            made = Path(folder) / "model"  # with ordinary permissions, inside a private folder
            made.mkdir()
            lm.model.save_pretrained(made)
            lm.tokenizer.save_pretrained(made)
            record = {**change.describe(), "targets": [vars(report) for report in reports]}
            _write_json(made / "curvature_edit.json", record)
            usual_file_permissions(made)
            made.rename(out)
    table = console_table("target", "pairs kept", "mass kept", "rank at most", "weight change")
    for one in reports:
        shares = f"{one.kept_share:.1%}", f"{one.kept_mass:.1%}"
        table.add_row(one.name, *shares, str(one.rank_bound), f"{one.relative_change:.3f}")
    Console().print(table)
    options.say_on_console(f"edited model: {out}")


@app.command("bands")
def bands_command(
    factors: FactorsFile,
    out: OutFolder,
    model: Model = DEFAULT_MODEL,
    device: Device = None,
    memorized: Memorized = None,
    clean: Annotated[
        Path | None, Option(help="Clean texts (JSON Lines); default: the project's own.")
    ] = None,
    seed: Seed = 0,
) -> None:
    """Compare how memorized and clean texts activate each curvature band.

    Memorized texts that the model does not recite are left out.
    """
    ordinary = [t for _, t in heldout_texts("test")] if clean is None else _texts_of(clean)
    lm, known = _load(model, device, factors)
    recited = _recited(lm, memorized, 2, "to compare them with clean ones")
    sets = [[[*prefix, *suffix] for _, prefix, suffix in recited], lm.encode(ordinary)]
    first, second = (kfac.band_profile(lm.model, lm.batches(ids), known) for ids in sets)
    ratios = kfac.band_ratios(first, second, seed=seed)
    layers = [target.layer for target in known.targets(lm.model, ratios.names)]
    places = list(dict.fromkeys(layer for layer in layers if layer is not None))
    kfac.figures.bands_figure(ratios, places if places == layers else None).save(out, "bands")
    record = {
        "targets": ratios.names,
        "bands": ratios.labels,
        "texts": ratios.n,
        "ratio": ratios.ratio.tolist(),
        "control": ratios.control.tolist(),
        "factors": known.digest,
    }
    _write_json(out / "bands.json", record)
    table = console_table("input of", *ratios.labels, title="memorized over clean [95 % interval]")
    for place, name in enumerate(ratios.names):
        cells = ratios.ratio[:, place].T
        table.add_row(name, *(f"{v:.2f} [{a:.2f}, {b:.2f}]" for v, a, b in cells))
    Console().print(table)
    options.say_on_console(f"figure: {out / 'bands.png'}")


@app.command("detect")
def detect_command(
    factors: FactorsFile,
    out: OutFolder,
    model: Model = DEFAULT_MODEL,
    device: Device = None,
    texts: Annotated[
        Path | None,
        Option(
            help="JSON Lines with `text` and, to measure the detector, `label` (memorized, clean); "
            "default: the project's passages that the model recites, and held-out texts."
        ),
    ] = None,
    flat: Annotated[float, Option(help="Share of input directions that count as flat.")] = 0.6,
    seed: Seed = 0,
) -> None:
    """Score texts by their share in flat directions: recited texts score high."""
    rows = [row for _, row in read_jsonl(texts or DATA / "passages.jsonl")]
    if texts is None:
        rows = [{**row, "label": "memorized"} for row in rows]
        rows += [{"id": i, "text": t, "label": "clean"} for i, t in heldout_texts("test")]
    for number, row in enumerate(rows, start=1):
        # A list, because a label may be of a type that cannot be hashed.
        if not isinstance(row.get("text"), str) or row.get("label", "clean") not in list(CLASSES):
            raise SettingError(
                f"--texts, row {number}: needs a `text`; a `label` must be {' or '.join(CLASSES)}"
            )
    lm, known = _load(model, device, factors)
    if texts is None:
        recited = {key for key, _, _ in _recited(lm, None, 0)}
        rows = [row for row in rows if row["label"] == "clean" or str(row["id"]) in recited]
    ids = lm.encode([row["text"] for row in rows])
    scores = kfac.flat_shares(lm.model, lm.batches(ids), known, flat=flat)
    lines: list[dict[str, Any]] = [
        {
            "id": str(row.get("id", index)),
            "label": row.get("label"),
            "score": float(scores.passages[index]),
            "tokens": [
                [lm.tokenizer.decode([token]), round(float(value), 5)]
                for token, value in zip(ids[index], scores.tokens[index], strict=True)
            ],
        }
        for index, row in enumerate(rows)
    ]
    written = [json.dumps(line, ensure_ascii=False) + "\n" for line in lines]
    atomic_write_text(out / "scores.jsonl", "".join(written))
    labelled = [line for line in lines if line["label"] is not None]
    labels = np.array([CLASSES[line["label"]] for line in labelled])
    if len(set(labels.tolist())) == 2:
        values = np.array([line["score"] for line in labelled])
        by_text = kfac.auroc(values, labels, seed=seed)
        # Tokens of a text depend on each other: no interval.
        tokens = np.array([score for line in labelled for _, score in line["tokens"]])
        by_token = float(
            roc_areas(tokens, labels.repeat([len(line["tokens"]) for line in labelled]))
        )
        kfac.figures.detector_figure(values, labels).save(out, "detector")
        record = {"auroc": vars(by_text), "token_auroc": by_token, "flat": flat}
        _write_json(out / "detector.json", {**record, "factors": known.digest})
        typer.echo(f"AUROC by text {by_text}, n = {by_text.n}; by token {by_token:.3f}")
    options.say_on_console(f"scores: {out / 'scores.jsonl'}")


@app.command("relearn")
def relearn_command(
    factors: FactorsFile,
    out: OutFolder,
    model: Model = DEFAULT_MODEL,
    device: Device = None,
    keep: Keep = 0.8,
    memorized: Memorized = None,
    steps: Annotated[str, Option(help="When to test.")] = "0,1,2,5,10,20",
    lr: Annotated[float, Option(help="Learning rate of the fine-tuning.")] = 1e-5,
    seed: Seed = 0,
) -> None:
    """Fine-tune the edited model on half of what it recited, and test the other half."""
    points = options.indices_option(steps, "--steps") or [0]
    lm, known = _load(model, device, factors)
    change = kfac.CurvatureEdit(known, keep)
    recited = _recited(lm, memorized, 4, "half to train on and half to test")
    generator = torch.Generator().manual_seed(seed)
    mixed = [recited[i] for i in torch.randperm(len(recited), generator=generator).tolist()]
    half = len(mixed) // 2
    batches = [_labelled(lm, prefix, suffix) for _, prefix, suffix in mixed]
    unrelated = lm.encode([text for _, text in heldout_texts("validation")])
    compared = {"edited": change, "never edited": None}
    learned, rest, other = batches[:half], batches[half:], _cut_alike(lm, unrelated, mixed[:half])
    result = kfac.relearn(
        lm.model, compared, learned, rest, other=other, steps=points, lr=lr, seed=seed
    )
    kfac.figures.relearning_figure(result).save(out, "relearning")
    arms = {
        arm: {"known": [vars(v) for v in result.known[arm]], "rest": [vars(v) for v in values]}
        for arm, values in result.rest.items()
    }
    record = {"steps": result.steps, "arms": arms, "lr": lr, "edit": change.describe()}
    _write_json(out / "relearning.json", record)
    table = console_table(
        "arm", *(f"{step} steps" for step in result.steps), title="other half recited"
    )
    for arm, values in result.rest.items():
        table.add_row(arm, *(f"{value.value:.0%}" for value in values))
    Console().print(table)
    options.say_on_console(f"figure: {out / 'relearning.png'}")


def _load(
    model: str, device: str | None, factors: Path
) -> tuple[lirefs.LanguageModel, kfac.Factors]:
    """Factors and model; the factors are read first, because that is quicker."""
    known = kfac.Factors.load(factors)
    lm = lirefs.load(model, device=device)
    known.check(lm.model)
    return lm, known


def _texts_of(path: Path) -> list[str]:
    """Texts of a JSON Lines file, each row with a `text`."""
    rows = read_jsonl(path)
    for line, row in rows:
        if not isinstance(row.get("text"), str) or not row["text"]:
            raise SettingError(f"{path}, line {line}: needs a `text` that is not empty")
    return [row["text"] for _, row in rows]


def _labelled(
    lm: lirefs.LanguageModel, prefix: Sequence[int], suffix: Sequence[int]
) -> dict[str, Any]:
    batch: dict[str, Any] = dict(lm.pad([[*prefix, *suffix]], side="right"))
    labels = batch["input_ids"].clone()
    labels[:, : len(prefix)] = -100
    return batch | {"labels": labels}


def _recited(
    lm: lirefs.LanguageModel, path: Path | None, least: int, purpose: str = ""
) -> list[Passage]:
    """The memorized texts that the model recites; prints how many, refuses fewer than `least`."""
    items = lirefs.recitation_task(lm, path or DATA / "passages.jsonl").items
    batches = [_labelled(lm, prefix, suffix) for _, prefix, suffix in items]
    flags = kfac.teacher_forced_matches(lm.model.eval(), batches).bool().tolist()
    recited = [item for item, yes in zip(items, flags, strict=True) if yes]
    found = f"the unchanged model recites {len(recited)} of {len(items)} memorized texts"
    if len(recited) < least:
        raise SettingError(f"{found}; at least {least} are needed, {purpose}")
    options.say_on_console(found)
    return recited


def _cut_alike(
    lm: lirefs.LanguageModel, texts: Sequence[Sequence[int]], items: Sequence[Passage]
) -> list[dict[str, Any]]:
    """A batch for each text, cut and labelled like one of the items: steps of as many tokens."""
    batches = []
    for text, (_, prefix, suffix) in zip(texts, itertools.cycle(items), strict=False):
        start = min(len(prefix), len(text) - 1)
        batches.append(_labelled(lm, text[:start], text[start : start + len(suffix)]))
    return batches


def _write_json(path: Path, value: dict[str, Any]) -> None:
    atomic_write_text(path, json.dumps(value, indent=1))
