"""`python -m experiments.vision`: networks memorize wrong labels, and an edit removes them."""

from __future__ import annotations

import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import torch
import typer

from experiments.vision.data import load_images
from experiments.vision.edits import Setting
from experiments.vision.report import FILES, findings, save, table
from experiments.vision.study import PAPER_KEEP, run
from experiments.vision.training import SHIPPED, VisionRecipe
from lirefs.cli.options import OutFolder, console, indices_option, numbers_option
from lirefs.files import refuse_foreign

SMALL = 2**18

app = typer.Typer(add_completion=False)


@app.command()
def vision(
    out: OutFolder = Path("vision-report"),
    images: Annotated[
        str,
        typer.Option(
            help="digits, a folder with one folder per class, or the name of a datasets set."
        ),
    ] = "digits",
    side: Annotated[
        int | None, typer.Option(min=1, help="Pixels on a side. Default: 8 for digits, else 32.")
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Use at most this many images.")] = None,
    seeds: Annotated[
        int,
        typer.Option(min=1, help="Number of networks; each has its own split, noise and weights."),
    ] = 5,
    noise: Annotated[float, typer.Option(help="Share of wrong labels.")] = VisionRecipe.noise,
    epochs: Annotated[
        int, typer.Option(min=1, help="Passes over the training images.")
    ] = VisionRecipe.epochs,
    depth: Annotated[int, typer.Option(min=1, help="Blocks of the network.")] = VisionRecipe.blocks,
    width: Annotated[int, typer.Option(min=1, help="Width of the network.")] = VisionRecipe.width,
    mlp: Annotated[int, typer.Option(min=1, help="Hidden units of its MLPs.")] = VisionRecipe.mlp,
    patch: Annotated[
        int, typer.Option(min=1, help="Pixels on a side of a patch.")
    ] = VisionRecipe.patch,
    weight_decay: Annotated[
        float, typer.Option(help="Weight decay of matrices.")
    ] = VisionRecipe.weight_decay,
    shift: Annotated[
        float, typer.Option(help="Augmentation: largest shift in pixels.")
    ] = VisionRecipe.shift,
    grain: Annotated[
        float, typer.Option(help="Augmentation: standard deviation of noise.")
    ] = VisionRecipe.grain,
    tokens: Annotated[str, typer.Option(help="Tokens that the factors count: cls or all.")] = "cls",
    blocks: Annotated[
        str | None, typer.Option(help="Edited blocks, e.g. 0,1. Default: the first and the last.")
    ] = None,
    projections: Annotated[
        str, typer.Option(help="Fixed setting: up, down, or up and down.")
    ] = "up and down",
    keep: Annotated[
        float, typer.Option(help="Fixed setting: share of the curvature mass to keep.")
    ] = PAPER_KEEP,
    decays: Annotated[
        str, typer.Option(help="Further weight decays of the heat map; '' for none.")
    ] = "0.05,0.15,1,2",
    retrain: Annotated[
        bool, typer.Option("--retrain", help="Do not use the shipped networks.")
    ] = False,
) -> None:
    """Train networks on partly wrong labels, edit them, and report what is recited and recovered.

    The trained networks of the default settings are shipped. Others are trained and kept in
    OUT/models; an interrupted training resumes.
    """
    recipe = VisionRecipe(
        blocks=depth,
        width=width,
        mlp=mlp,
        patch=patch,
        noise=noise,
        epochs=epochs,
        weight_decay=weight_decay,
        shift=shift,
        grain=grain,
    )
    refuse_foreign(out / "results.json", '"pairs_kept"', FILES)
    threads = torch.get_num_threads()
    if width * mlp <= SMALL:
        # Such a small product gains nothing from a second thread, and may wait for it.
        torch.set_num_threads(1)
    found = run(
        load_images(images, side, limit),
        recipe,
        out / "models",
        seeds=seeds,
        tokens=tokens,
        blocks=indices_option(blocks, "--blocks"),
        fixed=Setting(projections, keep),
        decays=numbers_option(decays, "--decays", float) if decays.strip() else [],
        shipped=None if retrain else SHIPPED,
        progress=sys.stderr.isatty(),
    )
    torch.set_num_threads(threads)
    settings = {"images": images, "side": side, "limit": limit, "tokens": tokens}
    page = save(found, out, settings | asdict(recipe))
    for line in (*table(found), *findings(found)):
        typer.echo(line)
    console.print(f"report: {page}", markup=False, soft_wrap=True)


if __name__ == "__main__":
    app()
