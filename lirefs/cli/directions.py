"""`lirefs probe`, `steer` and `export`: fit directions, steer with them, write them out."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

from typer import Argument, Option

import lirefs
from lirefs.cli import options
from lirefs.cli.options import (
    DEFAULT_MODEL,
    Device,
    DeviceMap,
    Dtype,
    Force,
    Json,
    Model,
    OutFolder,
    Quiet,
    Seed,
)
from lirefs.cli.probe_page import probe_page
from lirefs.comparison.compare import command_line
from lirefs.directions import estimators, geometry
from lirefs.directions import figures as probe_plots
from lirefs.errors import SettingError
from lirefs.export.gguf import to_gguf
from lirefs.files import atomic_write_text, cache_dir
from lirefs.main_job.settings import console_table
from lirefs.model.layout import SITES
from lirefs.organism.language import Language, language_seed
from lirefs.organism.tasks import organism_questions
from lirefs.questions.question import LABELS
from lirefs.steering.operators import OPERATORS

ESTIMATORS = {
    "mean": estimators.MeanDifference,
    "whitened": estimators.WhitenedMeanDifference,
    "logistic": estimators.LogisticDirection,
    "pca": estimators.PCADirection,
    "ridge": estimators.RidgeDirection,
}
DirectionsFile = Annotated[Path, Argument(help="Directions, as `lirefs probe` writes them.")]
Layer = Annotated[int | None, Option(help="Layer of the direction; default: the best one.")]


def probe_command(
    model: Model = DEFAULT_MODEL,
    device: Device = None,
    dtype: Dtype = None,
    device_map: DeviceMap = None,
    questions: Annotated[
        Path | None,
        Option(
            help="Labelled questions; a `score` in [0, 1] grades them. Default: the project's own; "
            "for an organism, those in its language."
        ),
    ] = None,
    labels: Annotated[
        str, Option(help="The two labels of the questions; directions point to the first.")
    ] = ",".join(LABELS),
    estimator: Annotated[str, Option(help=f"One of {', '.join(ESTIMATORS)}.")] = "mean",
    site: Annotated[str, Option(help="Where in the block.")] = "resid_pre",
    transfer: Annotated[
        Path | None, Option(help="Other labelled questions to score the directions on.")
    ] = None,
    against: Annotated[
        str | None, Option(help="Another model (base, say) to compare with.")
    ] = None,
    shuffles: Annotated[int, Option(min=1, help="Repetitions of the controls.")] = 100,
    out: OutFolder = Path("probe"),
    seed: Seed = 0,
    force: Force = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Fit directions, report them with their controls on a page, and write them to a file."""
    options.keep_finished(out / "probe.json", force)
    options.choice_option(estimator, "--estimator", ESTIMATORS)
    options.choice_option(site, "--site", SITES)
    if against == model:
        raise SettingError(f"--against {against}: this is the model itself; name another one")
    names = labels.split(",")
    own = _questions(model, questions, names)
    split = own.split(seed=seed)
    # A second set and a second model are checked before the first fit.
    other = other_split = None
    if transfer is not None:
        other = lirefs.load_questions(transfer, labels=names)
        geometry.refuse_fitted_questions(other, split)
        other_split = other.split(seed=seed)
    cache = cache_dir() / "activations"
    settings: dict[str, Any] = {
        "site": site, "shuffles": shuffles, "seed": seed, "cache": cache, "progress": not quiet,
    }  # fmt: skip
    lm = options.load_model(model, device, dtype, device_map)
    second = None if against is None else options.load_model(against, device, dtype, device_map)
    if second is not None and second.width != lm.width:
        raise SettingError(
            f"--against {against}: has width {second.width}, {model} has {lm.width}, so their "
            "directions cannot be compared"
        )
    found = lirefs.fit(lm, split, ESTIMATORS[estimator](), **settings)
    found.directions.save(out / "directions.safetensors")
    figures = {
        "layers": probe_plots.probe_by_layer(found),
        "best_layer": probe_plots.best_layer_figure({estimator: found}),
        "scatter": probe_plots.projection_scatter(
            geometry.components(lm, found.best, split), found
        ),
    }
    chance = 1.96 / lm.width**0.5
    maps = {f"between layers (random directions: within {chance:.2f})": found.directions}
    results = found.to_dict()
    if other is not None and other_split is not None:
        scored = geometry.transfer(lm, found.directions, other, split, seed=seed)
        figures["transfer"] = probe_plots.transfer_bars(found, {other.source: scored})
        results["transfer"] = [one.to_dict() for one in scored.auroc]
        maps[f"with directions of {Path(other.source).name}"] = lirefs.fit(
            lm, other_split, ESTIMATORS[estimator](), **settings
        ).directions
    figures["cosines"] = probe_plots.cosine_maps(
        {name: geometry.cosines(found.directions, one) for name, one in maps.items()}
    )
    if second is not None:
        twin = lirefs.fit(second, split, ESTIMATORS[estimator](), **settings)
        figures["side_by_side"] = probe_plots.probes_side_by_side(
            {lm.name: found, second.name: twin}
        )
    for name, picture in figures.items():
        picture.save(out, name)
    atomic_write_text(out / "probe.json", json.dumps(results, indent=2))
    run = {"date": f"{datetime.now(UTC):%Y-%m-%d %H:%M}", "command": command_line()}
    atomic_write_text(out / "report.html", probe_page(lm.name, own.source, found, figures, run))
    best = found.best_scores
    line = (
        f"layer {found.best_layer}: test AUROC {best.test_auroc}, n = {best.test_auroc.n}; "
        f"shuffled labels {found.shuffled} (p = {found.p_value:.3f}); random directions "
        f"{best.random_auroc}"
    )
    options.print_result(results, line, as_json)
    options.say_on_console(f"report: {out / 'report.html'}")


def steer_command(
    directions: DirectionsFile,
    prompt: Annotated[str, Argument(help="The text to continue.")],
    model: Model = DEFAULT_MODEL,
    device: Device = None,
    dtype: Dtype = None,
    device_map: DeviceMap = None,
    layer: Layer = None,
    operator: Annotated[str, Option(help=f"One of {', '.join(OPERATORS)}.")] = "add",
    strengths: Annotated[str, Option(help="One or more, e.g. -1,0.5,1.")] = "1",
    tokens: Annotated[int, Option(min=1, help="Most tokens to add.")] = 40,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Continue a prompt, unsteered and steered, side by side."""
    values = options.numbers_option(strengths, "--strengths", float)
    options.choice_option(operator, "--operator", OPERATORS)
    lm = options.load_model(model, device, dtype, device_map)
    chosen = _direction(directions, layer, lm)
    steerings = [lirefs.Steer(chosen, operator, value) for value in values]  # before any text
    title = f"{operator} at layer {chosen.layer}, {chosen.site}"
    table = console_table("strength", "continuation", title=title)
    table.show_lines = True
    said: list[tuple[float | None, str]] = [(None, lm.generate(prompt, max_new_tokens=tokens))]
    for value, steering in zip(values, steerings, strict=True):
        with steering.apply(lm.model):
            said.append((value, lm.generate(prompt, max_new_tokens=tokens)))
    for strength, text in said:
        table.add_row("unsteered" if strength is None else f"{strength:g}", text)
    rows = [{"strength": strength, "continuation": text} for strength, text in said]
    where = {"layer": chosen.layer, "site": chosen.site, "operator": operator}
    options.print_result({"prompt": prompt, **where, "continuations": rows}, table, as_json)


def export_command(
    directions: DirectionsFile,
    out: Annotated[Path, Argument(help="The .gguf file to write.", callback=options.file_to_write)],
    model: Model = DEFAULT_MODEL,
    device: Device = None,
    dtype: Dtype = None,
    device_map: DeviceMap = None,
    layer: Layer = None,
    strength: Annotated[float, Option(help="a of h + a d.")] = 1.0,
    force: Force = False,
    quiet: Quiet = False,
) -> None:
    """Write a direction as a control vector for llama.cpp."""
    options.keep_finished(out, force)
    lm = options.load_model(model, device, dtype, device_map)
    to_gguf(lirefs.Steer(_direction(directions, layer, lm), "add", strength), out, lm)
    options.say_on_console(f"written to {out}; use it with --control-vector")


def _questions(model: str, given: Path | None, labels: list[str]) -> lirefs.Questions:
    """The questions that are given, else an organism's own, else the project's."""
    taught = language_seed(model) if given is None else None
    if taught is not None:
        return organism_questions("passage", Language(taught))
    return lirefs.load_questions("default" if given is None else given, labels=labels)


def _direction(path: Path, layer: int | None, lm: lirefs.LanguageModel) -> lirefs.Direction:
    found = lirefs.Directions.load(path, lm)
    wanted = found.provenance.get("best_layer") if layer is None else layer
    has = f"{path} has the layers {', '.join(str(one) for one, _ in found)}"
    if wanted is None:
        raise SettingError(f"give --layer: {has}, and does not record which is the best")
    places = [one for one in found if one[0] == wanted]
    if len(places) != 1:
        raise SettingError(f"--layer {wanted}: {has}")
    return found[places[0]]
