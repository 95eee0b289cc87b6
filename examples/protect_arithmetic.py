"""Edit out recitation but protect arithmetic: keep what has curvature on either set of texts.

    python examples/protect_arithmetic.py [--model NAME] [--limit N]

Takes five minutes on two cores, two with `--limit 5`.
"""

import argparse

import kfac
import lirefs

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--model", default="smollm2-135m", help="built-in name, hub id or folder")
parser.add_argument("--limit", type=int, default=30, help="items per task")
options = parser.parse_args()

lm = lirefs.load(options.model)
layers = range(lm.n_layers)[lm.n_layers * 2 // 3 :][:3]  # as in the paper, from two thirds on

# Three-digit sums, so that none of the task's two-digit sums is among them.
sums = [f"What is {a} + {b}? Answer: {a + b}" for a in range(101, 131) for b in (117, 246)]
general = kfac.collect(lm, lirefs.calibration_texts()[:20], layers=layers)
arithmetic = kfac.collect(lm, sums, layers=layers)

tasks = lirefs.default_tasks(lm, limit=options.limit)
tasks = [task for task in tasks if task.group in ("memorization", "arithmetic", "language")]
comparison = lirefs.compare(
    lm,
    {
        "K-FAC": kfac.CurvatureEdit(general, keep=0.8),
        "arithmetic protected": kfac.UnionEdit(general, arithmetic, keep=0.8),
    },
    tasks,
)
for cell in comparison.cells():
    print(f"{cell.variant:22s} {cell.task:22s} {cell.metric:12s} {cell.value}, n = {cell.value.n}")
