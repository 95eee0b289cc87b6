"""`lirefs probe`, `steer` and `export`: fit directions, steer with them, write them out."""

from __future__ import annotations

import json
import shlex
from datetime import UTC, datetime
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

from typer import Argument, Option

import lirefs
from lirefs.cli import options
from lirefs.errors import SettingError
from lirefs.files import atomic_write_text, cache_dir, refuse_foreign
from lirefs.main_job.console import console_table
from lirefs.steering.operator_names import OPERATORS

ESTIMATORS = {
    "mean": "MeanDifference",
    "whitened": "WhitenedMeanDifference",
    "logistic": "LogisticDirection",
    "pca": "PCADirection",
    "ridge": "RidgeDirection",
}
"""The estimators by the names of `--estimator`: classes of `lirefs`."""
BAKED = "steering.json"
"""What was baked, in the folder of the model."""
PROBE_FILES = [
    "report.html",
    *options.figure_files("layers", "best_layer", "scatter", "transfer", "cosines", "side_by_side"),
]
"""What `lirefs probe` writes in addition to `probe.json` and the directions."""
DirectionsFile = Annotated[Path, Argument(help="Directions, as `lirefs probe` writes them.")]
Layer = Annotated[int | None, Option(help="Layer of the direction; default: the best one.")]
OperatorName = Annotated[str, Option(help=f"One of {', '.join(OPERATORS)}.")]


class Runtime(StrEnum):
    """What a steering is written for."""

    GGUF = "gguf"
    BAKED = "baked"
    VLLM = "vllm"
    TRANSFORMERS = "transformers"


def probe_command(
    model: options.Model = options.DEFAULT_MODEL,
    device: options.Device = None,
    dtype: options.Dtype = None,
    device_map: options.DeviceMap = None,
    questions: Annotated[
        Path | None,
        Option(
            help="Labelled questions; a `score` in [0, 1] grades them. Default: the project's own; "
            "for an organism, those in its language."
        ),
    ] = None,
    labels: options.Labels = options.DEFAULT_LABELS,
    estimator: Annotated[str, Option(help=f"One of {', '.join(ESTIMATORS)}.")] = "mean",
    site: Annotated[str, Option(help="Where in the block.")] = "resid_pre",
    transfer: Annotated[
        Path | None, Option(help="Other labelled questions to score the directions on.")
    ] = None,
    against: Annotated[
        str | None, Option(help="Another model (base, say) to compare with.")
    ] = None,
    shuffles: Annotated[int, Option(min=1, help="Repetitions of the controls.")] = 100,
    out: options.OutFolder = Path("probe"),
    seed: options.Seed = 0,
    force: options.Force = False,
    as_json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Fit directions, report them with their controls on a page, and write them to a file."""
    from lirefs.cli.probe_page import probe_page
    from lirefs.comparison.compare import command_line
    from lirefs.directions import figures as probe_plots
    from lirefs.directions import geometry
    from lirefs.directions.directions import FORMAT
    from lirefs.model.layout import SITES

    options.keep_finished(out / "probe.json", force, '{\n  "best_layer"', PROBE_FILES)
    refuse_foreign(out / "directions.safetensors", FORMAT)
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
    estimate = getattr(lirefs, ESTIMATORS[estimator])()
    found = lirefs.fit(lm, split, estimate, **settings)
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
            lm, other_split, estimate, **settings
        ).directions
    figures["cosines"] = probe_plots.cosine_maps(
        {name: geometry.cosines(found.directions, one) for name, one in maps.items()}
    )
    if second is not None:
        twin = lirefs.fit(second, split, estimate, **settings)
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
    model: options.Model = options.DEFAULT_MODEL,
    device: options.Device = None,
    dtype: options.Dtype = None,
    device_map: options.DeviceMap = None,
    layer: Layer = None,
    operator: OperatorName = "add",
    strengths: Annotated[str, Option(help="One or more, e.g. -1,0.5,1.")] = "1",
    tokens: Annotated[int, Option(min=1, help="Most tokens to add.")] = 40,
    as_json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Continue a prompt, unsteered and steered, side by side."""
    values = options.numbers_option(strengths, "--strengths", float)
    options.choice_option(operator, "--operator", OPERATORS)
    chosen = _direction(directions, layer)  # opened before a model is fetched and loaded
    steerings = [lirefs.Steer(chosen, operator, value) for value in values]
    lm = options.load_model(model, device, dtype, device_map)
    lirefs.Directions.load(directions, lm)  # are they of this model?
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
    out: Annotated[Path, Argument(help="What to write: a file; for baked, a new folder.")],
    to: Annotated[
        Runtime | None,
        Option(help="Default: transformers for a .safetensors file, else gguf."),
    ] = None,
    model: options.Model = options.DEFAULT_MODEL,
    device: options.Device = None,
    dtype: options.Dtype = None,
    device_map: options.DeviceMap = None,
    layer: Layer = None,
    operator: OperatorName = "add",
    strength: Annotated[float, Option(help="a of h + a d.")] = 1.0,
    force: options.Force = False,
    as_json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Write a steering for another program, and print what to run next.

    gguf: a control vector for llama.cpp. baked: a model that transformers loads without this
    package. vllm, transformers: the direction in a file of its own.
    """
    from lirefs.directions.directions import FORMAT
    from lirefs.export.gguf import ARCHITECTURE, to_gguf

    if to is None:
        to = Runtime.TRANSFORMERS if out.suffix == ".safetensors" else Runtime.GGUF
    options.choice_option(operator, "--operator", OPERATORS)
    if to is Runtime.BAKED:
        options.keep_folder(out, BAKED, force)
    else:
        options.file_to_write(out)
        options.keep_finished(out, force, ARCHITECTURE if to is Runtime.GGUF else FORMAT)
    steer = lirefs.Steer(_direction(directions, layer), operator, strength)  # opened first
    lm = options.load_model(model, device, dtype, device_map)
    lirefs.Directions.load(directions, lm)  # are they of this model?
    if to is Runtime.GGUF:
        to_gguf(steer, out, lm)
    elif to is Runtime.BAKED:
        options.save_model(lirefs.bake(steer, lm.model), lm.tokenizer, out, BAKED, steer.describe())
    else:
        steer.check(lm.model)
        _alone(directions, steer.directions[0]).save(out)
    lines = _next_lines(to, model, out, operator, strength)
    result = {"to": to, "out": str(out), "next": lines}
    options.print_result(result, "\n".join(lines), as_json)
    options.say_on_console(f"written to {out}")


def _alone(path: Path, direction: lirefs.Direction) -> lirefs.Directions:
    """One of the directions of a file, with what the file says about all of them."""
    provenance = lirefs.Directions.load(path).provenance | {"best_layer": direction.layer}
    return lirefs.Directions({(direction.layer, direction.site): direction}, provenance)


def _next_lines(to: Runtime, model: str, out: Path, operator: str, strength: float) -> list[str]:
    """What to run with an export: lines of a shell, or of Python."""
    if to is Runtime.GGUF:
        return [shlex.join(["llama-server", "-m", "MODEL.gguf", "--control-vector", str(out)])]
    if to is Runtime.BAKED:
        return [
            "from transformers import pipeline",
            f'print(pipeline("text-generation", {str(out)!r})("...", do_sample=False))',
        ]
    if to is Runtime.VLLM:
        from lirefs.export.vllm import WORKER
        from lirefs.model.builtin import BUILTIN

        # Workers may run in another folder.
        given = {"directions": str(out.absolute()), "operator": operator, "strength": strength}
        settings = ["--additional-config", json.dumps({"lirefs": given})]
        folder = str(BUILTIN[model]()) if model in BUILTIN else model  # vLLM knows no such name
        worker = ["--enforce-eager", "--worker-cls", WORKER]
        return [shlex.join(["vllm", "serve", folder, *worker, *settings])]
    return [
        "import lirefs",
        f"lm = lirefs.load({model!r})",
        f"direction = next(iter(lirefs.Directions.load({str(out)!r}, lm).values()))",
        f"with lirefs.Steer(direction, {operator!r}, {strength}).apply(lm.model):",
        '    print(lm.generate("..."))',
    ]


def _questions(model: str, given: Path | None, labels: list[str]) -> lirefs.Questions:
    """The questions that are given, else an organism's own, else the project's."""
    taught = lirefs.organism.language_seed(model) if given is None else None
    if taught is not None:
        language = lirefs.organism.Language(taught)
        return lirefs.organism.organism_questions("passage", language)
    return lirefs.load_questions("default" if given is None else given, labels=labels)


def _direction(path: Path, layer: int | None) -> lirefs.Direction:
    found = lirefs.Directions.load(path)
    wanted = found.provenance.get("best_layer") if layer is None else layer
    has = f"{path} has the layers {', '.join(str(one) for one, _ in found)}"
    if wanted is None:
        raise SettingError(f"give --layer: {has}, and does not record which is the best")
    places = [one for one in found if one[0] == wanted]
    if len(places) != 1:
        raise SettingError(f"--layer {wanted}: {has}")
    return found[places[0]]
