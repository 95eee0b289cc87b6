"""The command that plans a collection from a model's configuration."""

from __future__ import annotations

import math
from typing import Annotated

from typer import Option

import kfac
from lirefs.cli import options
from lirefs.cli.options import DEFAULT_MODEL, Json, Model, Quiet
from lirefs.errors import SettingError
from lirefs.main_job.console import console_table

ESTIMATORS = ("kfac", "marginal", "diagonal", "ekfac")
Projections = Annotated[
    str, Option(help="mlp_in, mlp_out, mlp, or name endings: gate_proj,q_proj.")
]


def plan_command(
    model: Model = DEFAULT_MODEL,
    dtype: Annotated[str, Option(help="Type of the weights when they are loaded.")] = "auto",
    layers: Annotated[str | None, Option(help="Layers, e.g. 20,21,22.")] = None,
    projections: Projections = "mlp_in",
    estimators: Annotated[
        str, Option(help="kfac, and any of marginal, diagonal, ekfac (a second pass).")
    ] = "kfac",
    budget: Annotated[
        float | None, Option(help="Memory for sums in GiB; more passes if they do not fit.")
    ] = None,
    sequences: Annotated[int, Option(min=1, help="Sequences of a batch.")] = 4,
    length: Annotated[int, Option(min=2, help="Tokens of a sequence.")] = 256,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Say what memory a collection, its eigenbases and an edit take, and what cannot run here.

    Only the configuration of the model is read.
    """
    from lirefs.model.loading import without_weights

    wanted = [part.strip() for part in estimators.split(",")]
    for name in wanted:
        options.choice_option(name, "--estimators", ESTIMATORS)
    options.choice_option(dtype, "--dtype", options.DTYPES)
    if budget is not None and not 0 < budget < math.inf:
        raise SettingError(f"--budget {budget}: must be above 0 GiB")
    chosen = options.indices_option(layers)
    empty = without_weights(model, dtype)
    targets = kfac.find_targets(empty, chosen, roles(projections))
    planned = kfac.plan(
        targets,
        None if budget is None else int(budget * 2**30),
        model=empty,
        batch=(sequences, length),
        marginals="marginal" in wanted,
        diagonal="diagonal" in wanted,
        correction="ekfac" in wanted,
    )
    result = {
        "targets": [target.name for target in targets],
        "passes": len(planned.passes),
        "phases": planned.phases,
        "impossible": planned.impossible,
    }
    table = console_table("phase", "what", "GB")
    for phase, parts in planned.phases.items():
        for what, size in (*parts.items(), ("together", sum(parts.values()))):
            table.add_row(phase, what, f"{size / 2**30:.2f}")
    options.print_result(result, table, as_json)
    for sentence in planned.impossible:
        options.say_on_console(f"impossible here: {sentence}")


def roles(projections: str) -> str | list[str]:
    """Return the `projections` of `find_targets` that an option names."""
    group = projections.strip()
    return group if group in ("mlp_in", "mlp_out", "mlp") else projections.split(",")
