"""Evaluate a steered model with lm-evaluation-harness.

python examples/lm_eval_steered.py [MODEL] [TASK] [LIMIT] [FOLDER OF YOUR OWN TASKS]
"""

import sys

import lirefs

model = sys.argv[1] if len(sys.argv) > 1 else "smollm2-135m"
task = sys.argv[2] if len(sys.argv) > 2 else "arc_easy"
limit = int(sys.argv[3]) if len(sys.argv) > 3 else 50
folder = sys.argv[4] if len(sys.argv) > 4 else None

lm = lirefs.load(model)
try:
    unsteered = lirefs.lm_eval_model(lm)
except lirefs.LirefsError as missing:
    sys.exit(str(missing))

import lm_eval
from lm_eval.tasks import TaskManager

known = TaskManager(include_path=folder)
probe = lirefs.fit(lm, lirefs.load_questions().split(seed=0), shuffles=10)
steered = lirefs.lm_eval_model(lm, probe.best.steer("add", 1.0))
for name, evaluated in {"steered": steered, "unsteered": unsteered}.items():
    found = lm_eval.simple_evaluate(evaluated, tasks=[task], task_manager=known, limit=limit)
    print(name, found["results"][task])
