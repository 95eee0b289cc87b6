"""`lirefs curvature`: collect factors and edit weights; its analyses are modules beside this."""

from __future__ import annotations

import hashlib
import json
import math
import tempfile
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

import kfac
import lirefs
from lirefs.cli.curvature_analyses import bands, detect, relearn
from lirefs.cli.inputs import load_with_factors, texts_of
from lirefs.cli.options import (
    DEFAULT_MODEL,
    Device,
    FactorsFile,
    Keep,
    Model,
    Seed,
    console,
    file_to_write,
    indices,
    new_folder,
    one_of,
)
from lirefs.errors import SettingError
from lirefs.files import atomic_write_text, usual_permissions, write_errors
from lirefs.tasks import suite

app = typer.Typer(no_args_is_help=True, help="Curvature of the weights, and edits by it.")
for command in (bands, detect, relearn):
    app.command()(command)


@app.command()
def collect(
    out: Annotated[Path, typer.Option(help="Factors file to write.", callback=file_to_write)],
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
    samples: Annotated[int, typer.Option(min=1, help="Sampled labels for each position.")] = 1,
    budget: Annotated[
        float | None, typer.Option(help="Memory for sums in GiB; more passes if they do not fit.")
    ] = None,
    seed: Seed = 0,
) -> None:
    """Collect the factors of a model over texts; an interrupted run goes on where it stopped."""
    wanted = [part.strip() for part in estimators.split(",")]
    for name in wanted:
        one_of(name, "--estimators", ("kfac", "marginal", "diagonal", "ekfac"))
    if budget is not None and not 0 < budget < math.inf:
        raise SettingError(f"--budget {budget}: must be above 0 GiB")
    chosen = indices(layers)
    rows = suite.calibration_texts() if texts is None else texts_of(texts)
    lm = lirefs.load(model, device=device)
    groups = {"mlp_in", "mlp_out", "mlp"}
    roles = projections.strip() if projections.strip() in groups else projections.split(",")
    targets = kfac.find_targets(lm.model, chosen, roles)
    ids = lm.encode(rows)
    options: dict[str, Any] = {"seed": seed, "samples": samples}
    if budget is not None:
        options["budget"] = int(budget * 2**30)
    states = [out.with_name(out.name + end) for end in (".checkpoint", ".ekfac-checkpoint")]
    factors = kfac.collect(
        lm,
        rows,
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
        factors = kfac.correct(lm, rows, factors, checkpoint=states[1], **options)
    factors.save(out)
    for state in states:
        state.unlink(missing_ok=True)
    console.print(f"{factors}: {out}", markup=False, soft_wrap=True)


@app.command()
def edit(
    factors: FactorsFile,
    out: Annotated[
        Path,
        typer.Option(help="Folder for the edited model; must be new.", callback=new_folder),
    ],
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
    lm, known = load_with_factors(model, device, factors)
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
