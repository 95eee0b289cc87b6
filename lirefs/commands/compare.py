"""`lirefs compare`: both methods and their controls on the same items, and a report."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Annotated

import torch
import torch.distributed as dist
import typer

import kfac
import lirefs
from lirefs.builtin import language_seed
from lirefs.commands.compare_jobs import Asked, compare_language_model, compare_organism
from lirefs.commands.options import Device, OutFolder, console, file_to_write, indices
from lirefs.errors import SettingError
from lirefs.harness.journal import Journal
from lirefs.harness.suite import Suite
from lirefs.organism.language import Language

DEFAULT = "organism"
DEFAULT_FOR_OWN_DATA = "smollm2-135m"  # the organism reads its own language only
QUICK = 14


def compare(
    model: Annotated[
        str | None,
        typer.Option(
            help="Built-in name, hub id, folder or .gguf file. Default: organism; with data of "
            "your own or lm-eval tasks, smollm2-135m."
        ),
    ] = None,
    device: Device = None,
    questions: Annotated[
        Path | None, typer.Option(help="Labelled questions (JSON Lines) to fit on.")
    ] = None,
    memorized: Annotated[
        Path | None, typer.Option(help="Memorized texts (JSON Lines) to recite.")
    ] = None,
    factors: Annotated[
        Path | None, typer.Option(help="Factors to use; written there if the file is missing.")
    ] = None,
    layers: Annotated[
        str | None, typer.Option(help="Layers whose MLPs are edited, e.g. 20,21,22.")
    ] = None,
    keep: Annotated[
        float | None,
        typer.Option(help="Curvature mass that K-FAC keeps. Default: 0.8; organism: chosen."),
    ] = None,
    strength: Annotated[
        float | None,
        typer.Option(help="a of h + a d, d the class difference. Default: 1; organism: chosen."),
    ] = None,
    suite: Annotated[
        Suite | None, typer.Option(help="Tasks to run. Default: those that the project ships.")
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option(help="Folder of JSON Lines for a suite, or of lm-eval tasks (YAML)."),
    ] = None,
    lm_eval: Annotated[
        str | None, typer.Option(help="Tasks of lm-evaluation-harness to add, by comma.")
    ] = None,
    limit: Annotated[
        int | None, typer.Option(min=1, help="At most this many items a task.")
    ] = None,
    out: OutFolder = Path("report"),
    seed: Annotated[int, typer.Option(min=0, help="Seed of splits, labels and controls.")] = 0,
    quick: Annotated[
        bool, typer.Option("--quick", help=f"{QUICK} items a task: a trial, no result.")
    ] = False,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with the interrupted run in --out.")
    ] = False,
) -> None:
    """Compare LiReF steering and the K-FAC edit on one model, and write a report.

    On the organism, settings that are not given are chosen on validation items. Under torchrun the
    items are split over the processes.
    """
    # Everything that can be wrong is looked at before the model is loaded.
    if keep is not None and not 0 < keep <= 1:
        raise kfac.KeepError(f"--keep {keep}: must be in (0, 1]")
    if strength is not None and not math.isfinite(strength):
        raise SettingError(f"--strength {strength}: must be finite")
    if factors is not None and not factors.is_file():
        file_to_write(factors)
    if data is not None and not data.is_dir():
        raise SettingError(f"--data {data}: is not a folder")
    if data is not None and suite is None and lm_eval is None:
        raise SettingError("--data goes with --suite or --lm-eval")
    own_data = any(one is not None for one in (questions, memorized, factors, data, lm_eval))
    if model is None:
        model = DEFAULT_FOR_OWN_DATA if own_data else DEFAULT
    taught = language_seed(model)
    if taught is not None and (own_data or suite is Suite.SKILLS):
        raise SettingError("an organism reads its own language only; give another --model")
    if memorized is not None:
        lirefs.files.read_jsonl(memorized)
    question_set = lirefs.load_questions("default" if questions is None else questions)
    asked = Asked(
        model=model,
        device=_join_processes(device),
        layers=indices(layers),
        keep=keep,
        strength=strength,
        suite=suite,
        data=data,
        memorized=memorized,
        factors=factors,
        lm_eval=[] if lm_eval is None else [name.strip() for name in lm_eval.split(",")],
        out=out,
        seed=seed,
        limit=min(limit or QUICK, QUICK) if quick else limit,
        quick=quick,
    )
    if asked.journal.exists() and not resume:
        console.print("starting anew; --resume would go on with the interrupted run", markup=False)
        Journal(asked.journal).clear()
    if taught is None:
        compare_language_model(asked, question_set)
    else:
        compare_organism(asked, Language(taught))


def _join_processes(device: str | None) -> str | None:
    """Under torchrun, join the other processes; all but the first one are silent."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return device
    cuda = torch.cuda.is_available() and (device or "cuda").startswith("cuda")
    if not dist.is_initialized():
        dist.init_process_group("nccl" if cuda else "gloo")
    console.quiet = dist.get_rank() > 0
    if not cuda:
        return device
    local = int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count()
    torch.cuda.set_device(local)
    return device if device and ":" in device else f"cuda:{local}"
