"""Send each finished cell of a comparison to Weights & Biases or to MLflow.

    python examples/log_comparison.py [--to mlflow] [--limit N]

Needs `pip install wandb` or `pip install mlflow`, and no account: both write here.
`mlflow ui --backend-store-uri sqlite:///mlflow.db` shows it, `wandb sync` sends it.
Takes 15 seconds on two cores.
"""

import argparse
from collections.abc import Callable

import lirefs
from lirefs.comparison import Cell
from lirefs.organism import Language, organism_tasks

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--to", choices=("wandb", "mlflow"), default="wandb", help="where to send")
parser.add_argument("--limit", type=int, default=20, help="items of a task")
options = parser.parse_args()

Send = Callable[[str, float], object]


def to_wandb() -> Send:
    """Write a run to ./wandb, which `wandb sync` sends."""
    import wandb

    run = wandb.init(project="lirefs", mode="offline")
    return lambda name, value: run.log({name: value})


def to_mlflow() -> Send:
    """Write a run to ./mlflow.db, which `mlflow ui` shows."""
    import mlflow

    mlflow.set_tracking_uri("sqlite:///mlflow.db")
    mlflow.set_experiment("lirefs")
    return mlflow.log_metric


lm, language = lirefs.load("organism"), Language()
questions = lirefs.load_questions("organism")
direction = lirefs.fit(lm, questions, layers=[1], progress=False).best
variants = {
    "LiReF": lirefs.Steer(direction, "add", 2.0),
    "random direction": lirefs.Steer(direction.random_like(seed=0), "add", 2.0),
}
wanted = ("planted sequences", "common facts", "conflicts, answer read")
tasks = [one for one in organism_tasks(lm, language, "test", options.limit) if one.name in wanted]
send = {"wandb": to_wandb, "mlflow": to_mlflow}[options.to]()


def finished(cell: Cell) -> None:
    """Send the value of a variant on a task, as soon as it is known."""
    send(f"{cell.task}/{cell.variant}".replace(",", ""), cell.value.value)  # MLflow takes no commas
    print(f"{cell.task}, {cell.variant}: {cell.value:.2f}")


lirefs.compare(lm, variants, tasks, callback=finished, progress=False)
