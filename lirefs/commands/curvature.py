"""`lirefs curvature`: collect factors, edit weights, and the analyses of the K-FAC paper."""

from __future__ import annotations

import hashlib
import itertools
import json
import tempfile
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
from lirefs.batching import batches_by_tokens
from lirefs.commands.steps import indices
from lirefs.commands.vision import vision
from lirefs.errors import SettingError
from lirefs.files import (
    atomic_write_bytes,
    atomic_write_text,
    read_jsonl,
    usual_permissions,
    write_errors,
)
from lirefs.harness import suite

BATCH_TOKENS = 1024
CLASSES = {"clean": 0, "memorized": 1}

app = typer.Typer(no_args_is_help=True, help="Curvature of the weights, and edits by it.")
app.command()(vision)
console = Console(stderr=True, highlight=False)

Model = Annotated[str, typer.Option(help="Built-in name, hub id, folder or .gguf file.")]
Device = Annotated[str | None, typer.Option(help="Default: cuda where there is one.")]
FactorsFile = Annotated[Path, typer.Option(help="File written by `lirefs curvature collect`.")]
Memorized = Annotated[
    Path | None, typer.Option(help="Memorized texts (JSON Lines); default: the project's own.")
]
Keep = Annotated[float, typer.Option(help="Share of curvature mass to keep, in (0, 1].")]
Seed = Annotated[int, typer.Option(help="Seed of labels, splits and intervals.")]
DEFAULT_MODEL = "smollm2-135m"


@app.command()
def collect(
    out: Annotated[Path, typer.Option(help="Factors file to write.")],
    model: Model = DEFAULT_MODEL,
    device: Device = None,
    texts: Annotated[
        Path | None, typer.Option(help="Texts (JSON Lines with `text`); default: the project's.")
    ] = None,
    layers: Annotated[str | None, typer.Option(help="Layers, e.g. 20,21,22.")] = None,
    projections: Annotated[
        str, typer.Option(help="mlp_in, mlp_out, mlp, or name endings: gate_proj,q_proj.")
    ] = "mlp_in",
    estimators: Annotated[
        str, typer.Option(help="kfac, and any of marginal, diagonal, ekfac (a second pass).")
    ] = "kfac",
    samples: Annotated[int, typer.Option(help="Sampled labels for each position.")] = 1,
    budget: Annotated[
        float | None, typer.Option(help="Memory for sums in GiB; more passes if they do not fit.")
    ] = None,
    seed: Seed = 0,
) -> None:
    """Collect the factors of a model over texts; an interrupted run goes on where it stopped."""
    wanted = {part.strip() for part in estimators.split(",")}
    unknown = sorted(wanted - {"kfac", "marginal", "diagonal", "ekfac"})
    if unknown:
        raise SettingError(f"--estimators: {unknown[0]!r} is not one that can be collected")
    if out.is_dir():
        raise SettingError(f"--out {out}: is a folder, a file is needed")
    chosen = indices(layers)
    rows = suite.calibration_texts() if texts is None else _texts(texts)
    lm = lirefs.load(model, device=device)
    groups = {"mlp_in", "mlp_out", "mlp"}
    roles = projections.strip() if projections.strip() in groups else projections.split(",")
    targets = kfac.find_targets(lm.model, chosen, roles)
    ids = lm.encode(rows)
    _, batches = _batches(lm, ids)
    options: dict[str, Any] = {"seed": seed, "samples": samples}
    if budget is not None:
        options["budget"] = int(budget * 2**30)
    states = [out.with_name(out.name + end) for end in (".checkpoint", ".ekfac-checkpoint")]
    factors = kfac.collect(
        lm.model,
        batches,
        targets,
        marginals="marginal" in wanted,
        diagonal="diagonal" in wanted,
        checkpoint=states[0],
        provenance={
            "data": hashlib.sha256(repr(ids).encode()).hexdigest(),
            "model": lm.fingerprint,
            "tokenizer": lm.tokenizer_fingerprint,
            "lirefs": lirefs.__version__,
        },
        **options,
    )
    if "ekfac" in wanted:
        factors = kfac.correct(lm.model, batches, factors, checkpoint=states[1], **options)
    factors.save(out)
    for state in states:
        state.unlink(missing_ok=True)
    console.print(f"{factors}: {out}", markup=False, soft_wrap=True)


@app.command()
def edit(
    factors: FactorsFile,
    out: Annotated[Path, typer.Option(help="Folder for the edited model; must be new.")],
    model: Model = DEFAULT_MODEL,
    device: Device = None,
    keep: Keep = 0.8,
    estimator: Annotated[
        str, typer.Option(help="kfac, ekfac, marginal, input, output or diagonal.")
    ] = "kfac",
    shape: Annotated[str, typer.Option(help="pairs, rectangle, output or input.")] = "pairs",
    saliency: Annotated[
        bool, typer.Option("--saliency", help="Rank by mass times squared coordinate.")
    ] = False,
) -> None:
    """Edit a model and save it in a folder that transformers loads without this package."""
    if out.exists():
        raise SettingError(f"--out {out}: exists; name a new folder")
    lm, known = _load(model, device, factors)
    change = kfac.CurvatureEdit(known, keep, estimator=estimator, shape=shape, saliency=saliency)
    reports = change.report(lm.model)
    change.bake(lm.model)
    with write_errors(out):
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".tmp-", dir=out.parent) as folder:
            made = Path(folder) / "model"  # of ordinary permissions, inside a private folder
            made.mkdir()
            lm.model.save_pretrained(made)
            lm.tokenizer.save_pretrained(made)
            record = {**change.describe(), "targets": [vars(report) for report in reports]}
            atomic_write_text(made / "curvature_edit.json", json.dumps(record, indent=1))
            usual_permissions(made)
            made.rename(out)
    table = Table("target", "pairs kept", "mass kept", "rank at most", "weight change")
    for one in reports:
        table.add_row(
            one.name,
            f"{one.kept_share:.1%}",
            f"{one.kept_mass:.1%}",
            str(one.rank_bound),
            f"{one.relative_change:.3f}",
        )
    Console().print(table)
    console.print(f"edited model: {out}", markup=False, soft_wrap=True)


@app.command()
def bands(
    factors: FactorsFile,
    out: Annotated[Path, typer.Option(help="Folder of the figure and the numbers.")],
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
    ordinary = [t for _, t in suite.heldout_texts("test")] if clean is None else _texts(clean)
    lm, known = _load(model, device, factors)
    recited = _recited(lm, memorized, 2, "to compare them with clean ones")
    sets = [[[*prefix, *suffix] for _, prefix, suffix in recited], lm.encode(ordinary)]
    first, second = (kfac.band_profile(lm.model, _batches(lm, ids)[1], known) for ids in sets)
    ratios = kfac.band_ratios(first, second, seed=seed)
    layers = [target.layer for target in known.targets(lm.model, ratios.names)]
    places = [layer for layer in layers if layer is not None]
    distinct = len(set(places)) == len(layers)
    atomic_write_bytes(out / "bands.png", kfac.plots.bands(ratios, places if distinct else None))
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


@app.command()
def detect(
    factors: FactorsFile,
    out: Annotated[Path, typer.Option(help="Folder of the scores and the figure.")],
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
    lm, known = _load(model, device, factors)
    if texts is None:
        recited = {key for key, _, _ in _recited(lm, None, 0)}
        rows = [row for row in rows if row["label"] == "clean" or str(row["id"]) in recited]
    ids = lm.encode([row["text"] for row in rows])
    order, batches = _batches(lm, ids)
    scores = kfac.score_recitation(lm.model, batches, known, flat=flat)
    lines: list[dict[str, Any]] = [{} for _ in rows]
    for place, index in enumerate(order):
        words = [lm.tokenizer.decode([token]) for token in ids[index]]
        lines[index] = {
            "id": str(rows[index].get("id", index)),
            "label": rows[index].get("label"),
            "score": float(scores.passages[place]),
            "tokens": [
                [word, round(float(value), 5)]
                for word, value in zip(words, scores.tokens[place], strict=True)
            ],
        }
    atomic_write_text(
        out / "scores.jsonl", "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    )
    labelled = [line for line in lines if line["label"] is not None]
    labels = np.array([CLASSES[line["label"]] for line in labelled])
    if len(set(labels.tolist())) == 2:
        values = np.array([line["score"] for line in labelled])
        tokens = [np.array([score for _, score in line["tokens"]]) for line in labelled]
        by_text = kfac.auroc(values, labels, seed=seed)
        by_token = _token_auroc(tokens, labels)
        atomic_write_bytes(out / "detector.png", kfac.plots.detector(values, labels))
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


@app.command()
def relearn(
    factors: FactorsFile,
    out: Annotated[Path, typer.Option(help="Folder of the figure and the numbers.")],
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
    lm, known = _load(model, device, factors)
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
    atomic_write_bytes(out / "relearning.png", kfac.plots.relearning(result))
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


def _load(
    model: str, device: str | None, factors: Path
) -> tuple[lirefs.LanguageModel, kfac.Factors]:
    """Read the factors before the model, which takes longer, and check that they fit."""
    known = kfac.Factors.load(factors)
    lm = lirefs.load(model, device=device)
    known.check(lm.model)
    return lm, known


def _batches(
    lm: lirefs.LanguageModel, ids: Sequence[Sequence[int]]
) -> tuple[list[int], list[dict[str, torch.Tensor]]]:
    """Return the order in which the texts come, and right-padded batches of them."""
    groups = batches_by_tokens([len(row) for row in ids], BATCH_TOKENS)
    batches = [lm.pad([ids[row] for row in rows], side="right") for rows in groups]
    return [row for rows in groups for row in rows], batches


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


def _token_auroc(tokens: Sequence[Any], labels: Any) -> float:
    """AUROC over single tokens, by ranks; tokens of a text depend on each other: no interval."""
    values = np.concatenate(tokens)
    classes = np.concatenate(
        [np.full(len(one), label) for one, label in zip(tokens, labels, strict=True)]
    )
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    ranks = (np.cumsum(counts) - (counts - 1) / 2)[inverse]
    positive = classes.sum()
    wins = ranks[classes == 1].sum() - positive * (positive + 1) / 2
    return float(wins / (positive * (len(classes) - positive)))


def _texts(path: Path) -> list[str]:
    rows = read_jsonl(path)
    for line, row in rows:
        if not isinstance(row.get("text"), str) or not row["text"]:
            raise SettingError(f"{path}, line {line}: needs a `text` that is not empty")
    return [str(row["text"]) for _, row in rows]


def _write_json(path: Path, value: dict[str, Any]) -> None:
    atomic_write_text(path, json.dumps(value, indent=1))
