"""Evaluate a steered model with lm-evaluation-harness.

    python examples/lm_eval_steered.py [--model NAME] [--task TASK] [--tasks FOLDER] [--limit N]

Takes three minutes on two cores, one with `--limit 10`. The harness fetches its own tasks from the
hub; with `--tasks`, a folder with a task of your own, no hub is needed.
"""

import argparse
import sys

import lirefs

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--model", default="smollm2-135m", help="built-in name, hub id or folder")
parser.add_argument("--task", default="arc_easy", help="a task of lm-evaluation-harness")
parser.add_argument("--tasks", help="folder with tasks of your own")
parser.add_argument("--limit", type=int, default=50, help="items of the task")
options = parser.parse_args()

lm = lirefs.load(options.model)
try:
    unsteered = lirefs.lm_eval_model(lm)
except lirefs.LirefsError as missing:
    sys.exit(str(missing))

import lm_eval
from lm_eval.tasks import TaskManager

known = TaskManager(include_path=options.tasks)


def results(evaluated):
    """Return the metrics of the task."""
    found = lm_eval.simple_evaluate(
        evaluated, tasks=[options.task], task_manager=known, limit=options.limit
    )
    return found["results"][options.task]


print("unsteered", results(unsteered))
probe = lirefs.fit(lm, lirefs.load_questions().split(seed=0), shuffles=10)
print("steered", results(lirefs.lm_eval_model(lm, lirefs.Steer(probe.best, "add", 1.0))))
