"""`lirefs compare`: the main job, `lirefs.main_job.run`, from the command line."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

from typer import Option

from lirefs.cli.options import (
    DEFAULT_LABELS,
    Device,
    DeviceMap,
    Dtype,
    Force,
    Json,
    Labels,
    OutFolder,
    Quiet,
    Seed,
    console,
    file_to_write,
    indices_option,
    keep_finished,
    print_result,
)
from lirefs.tasks.settings import QUICK, Suite


def compare_command(
    model: Annotated[
        str | None,
        Option(
            help="Built-in name, hub id, folder or .gguf file. Default: organism; with data of "
            "your own or lm-eval tasks, smollm2-135m."
        ),
    ] = None,
    device: Device = None,
    dtype: Dtype = None,
    device_map: DeviceMap = None,
    questions: Annotated[Path | None, Option(help="Questions (JSON Lines) to fit on.")] = None,
    labels: Labels = DEFAULT_LABELS,
    memorized: Annotated[
        Path | None,
        Option(help="Texts to recite: JSON Lines, a file of text (one item) or a folder of them."),
    ] = None,
    factors: Annotated[
        Path | None, Option(help="Factors to use; written there if the file is missing.")
    ] = None,
    direction_layers: Annotated[
        str | None, Option(help="Layers to choose the direction's from. Default: all.")
    ] = None,
    edit_layers: Annotated[str | None, Option(help="Layers to edit, e.g. 20,21,22.")] = None,
    keep: Annotated[
        float | None,
        Option(help="Curvature mass that K-FAC keeps. Default: chosen on validation items."),
    ] = None,
    strength: Annotated[
        float | None,
        Option(help="a of h + a d, d the class difference. Default: 1; organism: chosen."),
    ] = None,
    suite: Annotated[Suite | None, Option(help="Tasks. Default: the project's own.")] = None,
    data: Annotated[
        Path | None,
        Option(help="Folder of JSON Lines for a suite, or of lm-eval tasks (YAML)."),
    ] = None,
    lm_eval: Annotated[
        str | None, Option(help="lm-evaluation-harness tasks to add, separated by commas.")
    ] = None,
    limit: Annotated[int | None, Option(min=1, help="Most items of a task.")] = None,
    out: OutFolder = Path("report"),
    seed: Seed = 0,
    quick: Annotated[
        bool,
        Option(
            "--quick", help=f"A trial with {QUICK} items per task and fewer settings, not a result."
        ),
    ] = False,
    resume: Annotated[
        bool, Option("--resume", help="Continue the interrupted run in --out.")
    ] = False,
    force: Force = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Compare LiReF steering and the K-FAC edit on one model, and write a report.

    On the organism, settings that are not given are chosen on validation items. Under torchrun the
    items are split over the processes.
    """
    from lirefs.comparison.journal import journal_files
    from lirefs.comparison.results_file import FORMAT
    from lirefs.main_job.jobs import first_process, retained_table, run
    from lirefs.model.processes.world import together

    if not (resume and journal_files(out / "unfinished")):
        keep_finished(out / "results.json", force, FORMAT)  # `run` looks at the other files
    if factors is not None and not factors.is_file():
        file_to_write(factors)
    device = _join_processes(device)
    with together("lirefs compare"):
        comparison = run(
            model,
            device=device,
            dtype=dtype,
            device_map=device_map,
            questions=questions,
            labels=labels.split(","),
            memorized=memorized,
            factors=factors,
            direction_layers=indices_option(direction_layers, "--direction-layers"),
            edit_layers=indices_option(edit_layers, "--edit-layers"),
            keep=keep,
            strength=strength,
            suite=suite,
            data=data,
            lm_eval=[] if lm_eval is None else [name.strip() for name in lm_eval.split(",")],
            limit=limit,
            out=out,
            seed=seed,
            quick=quick,
            resume=resume,
            console=console,
        )
    if first_process():
        summary = comparison.summary()
        shares = {
            variant: {g: summary.means[variant, g].to_dict() for g in summary.groups}
            for variant in summary.variants[1:]
        }
        print_result({"retained": shares}, retained_table(summary), as_json)


def _join_processes(device: str | None) -> str | None:
    """Under torchrun, join the other processes; all but the first are silent."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return device
    import torch
    import torch.distributed as dist

    from lirefs.main_job.jobs import first_process

    cuda = torch.cuda.is_available() and (device or "cuda").startswith("cuda")
    if not dist.is_initialized():
        dist.init_process_group("nccl" if cuda else "gloo")
    console.quiet = console.quiet or not first_process()
    if not cuda:
        return device
    local = int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count()
    torch.cuda.set_device(local)
    return device if device and ":" in device else f"cuda:{local}"
