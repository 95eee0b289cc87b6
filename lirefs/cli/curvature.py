"""`lirefs curvature`: collect factors, edit weights by them, and the K-FAC paper's analyses."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer import Option

import kfac
import lirefs
from lirefs.cli import options
from lirefs.cli.curvature_plan import ESTIMATORS, Projections, plan_command, roles
from lirefs.cli.options import (
    DEFAULT_MODEL,
    Device,
    DeviceMap,
    Dtype,
    FactorsFile,
    Force,
    Json,
    Keep,
    Model,
    OutFolder,
    Quiet,
    Seed,
)
from lirefs.cli.passages import Passage, batches_cut_alike, labelled_batch, texts_to_read
from lirefs.errors import SettingError
from lirefs.files import atomic_write_text
from lirefs.main_job.console import console_table
from lirefs.tasks.shipped_data import DATA

if TYPE_CHECKING:
    from lirefs.tasks.texts import TextRow

CLASSES = {"clean": 0, "memorized": 1}
Memorized = Annotated[
    Path | None,
    Option(help="Memorized texts (JSON Lines, text, folder). Default: our own."),
]

app = typer.Typer(no_args_is_help=True, help="Curvature of the weights, and edits by it.")
app.command("plan")(plan_command)


@app.command("collect")
def collect_command(
    out: Annotated[Path, Option(help="Factors file to write.", callback=options.file_to_write)],
    model: Model = DEFAULT_MODEL,
    device: Device = None,
    dtype: Dtype = None,
    device_map: DeviceMap = None,
    texts: Annotated[
        Path | None, Option(help="Texts (JSON Lines, text, folder); default: the project's.")
    ] = None,
    layers: Annotated[str | None, Option(help="Layers, e.g. 20,21,22.")] = None,
    projections: Projections = "mlp_in",
    estimators: Annotated[
        str, Option(help="kfac, and any of marginal, diagonal, ekfac (a second pass).")
    ] = "kfac",
    samples: Annotated[int, Option(min=1, help="Sampled labels for each position.")] = 1,
    budget: Annotated[
        float | None, Option(help="Memory for sums in GiB; more passes if they do not fit.")
    ] = None,
    seed: Seed = 0,
    force: Force = False,
    quiet: Quiet = False,
) -> None:
    """Collect the factors of a model over texts; an interrupted run continues where it stopped."""
    options.keep_finished(out, force, "kfac_factors")
    wanted = [part.strip() for part in estimators.split(",")]
    for name in wanted:
        options.choice_option(name, "--estimators", ESTIMATORS)
    if budget is not None and not 0 < budget < math.inf:
        raise SettingError(f"--budget {budget}: must be above 0 GiB")
    chosen = options.indices_option(layers)
    rows = lirefs.calibration_texts() if texts is None else texts_to_read(texts)
    lm = options.load_model(model, device, dtype, device_map)
    targets = kfac.find_targets(lm.model, chosen, roles(projections))
    room = None if budget is None else int(budget * 2**30)
    settings: dict[str, Any] = {
        "seed": seed, "samples": samples, "budget": room, "progress": not quiet
    }  # fmt: skip
    provenance = {
        "data": hashlib.sha256(repr(lm.encode(rows)).encode()).hexdigest(),
        "model": lm.fingerprint,
        "tokenizer": lm.tokenizer_fingerprint,
        "lirefs": lirefs.__version__,
    }
    states = [out.with_name(out.name + ".checkpoint")]
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
        states.append(out.with_name(out.name + ".ekfac-checkpoint"))
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
        Option(help="Folder for the edited model.", callback=options.folder_to_write),
    ],
    model: Model = DEFAULT_MODEL,
    device: Device = None,
    dtype: Dtype = None,
    device_map: DeviceMap = None,
    keep: Keep = 0.8,
    estimator: Annotated[
        str, Option(help="kfac, ekfac, marginal, input, output or diagonal.")
    ] = "kfac",
    shape: Annotated[str, Option(help="pairs, rectangle, output or input.")] = "pairs",
    saliency: Annotated[
        bool, Option("--saliency", help="Rank by mass times squared coordinate.")
    ] = False,
    force: Force = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Edit a model and save it in a folder that transformers loads without this package.

    Targets are edited in turn and written in files of 1 GB, so no second copy of the model is held
    in memory. What happens to each target is printed before anything is written. --force replaces a
    folder only if this command wrote it.
    """
    options.keep_folder(out, "curvature_edit.json", force)
    known = kfac.Factors.load(factors)
    change = kfac.CurvatureEdit(known, keep, estimator=estimator, shape=shape, saliency=saliency)
    lm = _load(known, model, device, dtype, device_map)
    if estimator != "diagonal":
        known.decompose(progress=not quiet)
    reports = change.bake_in_turn(lm.model)
    record = {**change.describe(), "targets": [vars(report) for report in reports]}
    table = console_table("target", "pairs kept", "mass kept", "rank at most", "weight change")
    for one in reports:
        shares = f"{one.kept_share:.1%}", f"{one.kept_mass:.1%}"
        table.add_row(one.name, *shares, str(one.rank_bound), f"{one.relative_change:.3f}")
    options.print_result(record, table, as_json)
    options.save_model(lm.model, lm.tokenizer, out, "curvature_edit.json", record)
    options.say_on_console(f"edited model: {out}")


@app.command("bands")
def bands_command(
    factors: FactorsFile,
    out: OutFolder,
    model: Model = DEFAULT_MODEL,
    device: Device = None,
    dtype: Dtype = None,
    device_map: DeviceMap = None,
    memorized: Memorized = None,
    clean: Annotated[
        Path | None,
        Option(help="Clean texts (JSON Lines, text, folder). Default: our own."),
    ] = None,
    seed: Seed = 0,
    force: Force = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Compare how memorized and clean texts activate each curvature band.

    Memorized texts that the model does not recite are left out.
    """
    from lirefs.tasks.default_suite import heldout_texts
    from lirefs.tasks.texts import text_rows

    options.keep_finished(out / "bands.json", force, '"bands"', options.figure_files("bands"))
    ordinary = [t for _, t in heldout_texts("test")] if clean is None else texts_to_read(clean)
    passages = text_rows(memorized or DATA / "passages.jsonl", "memorized")
    known = kfac.Factors.load(factors)
    lm = _load(known, model, device, dtype, device_map)
    recited = _recited(lm, passages, 2, "to compare them with clean ones")
    sets = [[[*prefix, *suffix] for _, prefix, suffix in recited], lm.encode(ordinary)]
    known.decompose(sides="A", progress=not quiet)
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
    options.print_result(record, table, as_json)
    options.say_on_console(f"figure: {out / 'bands.png'}")


@app.command("detect")
def detect_command(
    factors: FactorsFile,
    out: OutFolder,
    model: Model = DEFAULT_MODEL,
    device: Device = None,
    dtype: Dtype = None,
    device_map: DeviceMap = None,
    texts: Annotated[
        Path | None,
        Option(
            help="Texts, or JSON Lines with `text` and, to measure the detector, `label` "
            "(memorized, clean). Default: our passages that the model recites, and held-out texts."
        ),
    ] = None,
    flat: Annotated[float, Option(help="Share of input directions that count as flat.")] = 0.6,
    seed: Seed = 0,
    force: Force = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Score texts by their share in flat directions: memorized texts score high."""
    import numpy as np

    from lirefs.statistics.intervals import roc_areas
    from lirefs.tasks.default_suite import heldout_texts
    from lirefs.tasks.texts import TextRow, text_rows

    others = ["detector.json", *options.figure_files("detector")]
    options.keep_finished(out / "scores.jsonl", force, '"score"', others)
    rows = text_rows(texts or DATA / "passages.jsonl", "texts", SettingError)
    if texts is None:
        rows = [one._replace(fields={**one.fields, "label": "memorized"}) for one in rows]
        rows += [
            TextRow(key, "held-out texts", {"text": text, "label": "clean"})
            for key, text in heldout_texts("test")
        ]
    for row in rows:
        # A list, because a label may be of a type that cannot be hashed.
        label, known_labels = row.fields.get("label", "clean"), list(CLASSES)
        if not isinstance(row.fields.get("text"), str) or label not in known_labels:
            raise SettingError(
                f"{row.where}: needs a `text`; a `label` must be {' or '.join(CLASSES)}"
            )
    known = kfac.Factors.load(factors)
    lm = _load(known, model, device, dtype, device_map)
    if texts is None:
        recited = {
            key for key, _, _ in _recited(lm, text_rows(DATA / "passages.jsonl", "texts"), 0)
        }
        rows = [one for one in rows if one.fields["label"] == "clean" or one.id in recited]
    ids = lm.encode([row.fields["text"] for row in rows])
    known.decompose(sides="A", progress=not quiet)
    scores = kfac.flat_shares(lm.model, lm.batches(ids), known, flat=flat)
    lines: list[dict[str, Any]] = [
        {
            "id": row.id,
            "label": row.fields.get("label"),
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
        record["factors"] = known.digest
        _write_json(out / "detector.json", record)
        line = f"AUROC by text {by_text}, n = {by_text.n}; by token {by_token:.3f}"
        options.print_result(record, line, as_json)
    else:
        table = console_table("text", "flat share")
        for one in lines:
            table.add_row(one["id"], f"{one['score']:.3f}")
        options.print_result({one["id"]: one["score"] for one in lines}, table, as_json)
    options.say_on_console(f"scores: {out / 'scores.jsonl'}")


@app.command("relearn")
def relearn_command(
    factors: FactorsFile,
    out: OutFolder,
    model: Model = DEFAULT_MODEL,
    device: Device = None,
    dtype: Dtype = None,
    device_map: DeviceMap = None,
    keep: Keep = 0.8,
    memorized: Memorized = None,
    steps: Annotated[str, Option(help="When to test.")] = "0,1,2,5,10,20",
    lr: Annotated[float, Option(help="Learning rate of the fine-tuning.")] = 1e-5,
    seed: Seed = 0,
    force: Force = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Fine-tune the edited model on half of what it recited, and test the other half."""
    import torch

    from lirefs.tasks.default_suite import heldout_texts
    from lirefs.tasks.texts import text_rows

    others = options.figure_files("relearning")
    options.keep_finished(out / "relearning.json", force, '"arms"', others)
    points = options.indices_option(steps, "--steps") or [0]
    passages = text_rows(memorized or DATA / "passages.jsonl", "memorized")
    known = kfac.Factors.load(factors)
    change = kfac.CurvatureEdit(known, keep)
    lm = _load(known, model, device, dtype, device_map)
    recited = _recited(lm, passages, 4, "half to train on and half to test")
    generator = torch.Generator().manual_seed(seed)
    mixed = [recited[i] for i in torch.randperm(len(recited), generator=generator).tolist()]
    half = len(mixed) // 2
    batches = [labelled_batch(lm, prefix, suffix) for _, prefix, suffix in mixed]
    unrelated = lm.encode([text for _, text in heldout_texts("validation")])
    compared = {"edited": change, "never edited": None}
    learned, rest, other = (
        batches[:half],
        batches[half:],
        batches_cut_alike(lm, unrelated, mixed[:half]),
    )
    training: dict[str, Any] = {"steps": points, "lr": lr, "seed": seed, "progress": not quiet}
    known.decompose(progress=not quiet)
    result = kfac.relearn(lm.model, compared, learned, rest, other=other, **training)
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
    options.print_result(record, table, as_json)
    options.say_on_console(f"figure: {out / 'relearning.png'}")


def _load(factors: kfac.Factors, model: str, *where: str | None) -> lirefs.LanguageModel:
    """The model of these factors; files are opened before, because that is quicker."""
    lm = options.load_model(model, *where)
    factors.check(lm.model)
    return lm


def _recited(
    lm: lirefs.LanguageModel, rows: Sequence[TextRow], least: int, purpose: str = ""
) -> list[Passage]:
    """The memorized texts that the model recites; prints how many, refuses fewer than `least`."""
    from lirefs.tasks.recitation import recitation_of_rows

    items = recitation_of_rows(lm, rows, "passages").items
    batches = [labelled_batch(lm, prefix, suffix) for _, prefix, suffix in items]
    flags = kfac.teacher_forced_matches(lm.model.eval(), batches).bool().tolist()
    recited = [item for item, yes in zip(items, flags, strict=True) if yes]
    found = f"the unchanged model recites {len(recited)} of {len(items)} memorized texts"
    if len(recited) < least:
        raise SettingError(f"{found}; at least {least} are needed, {purpose}")
    options.say_on_console(found)
    return recited


def _write_json(path: Path, value: dict[str, Any]) -> None:
    atomic_write_text(path, json.dumps(value, indent=1))
