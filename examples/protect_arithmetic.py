"""Edit out recitation, but protect arithmetic: keep what either set of texts curves.

python examples/protect_arithmetic.py [MODEL [LAYERS [ITEMS]]]
"""

import sys

import kfac
import lirefs

MODEL = sys.argv[1] if len(sys.argv) > 1 else "smollm2-135m"
LAYERS = [int(x) for x in sys.argv[2].split(",")] if len(sys.argv) > 2 else [20, 21, 22]
ITEMS = int(sys.argv[3]) if len(sys.argv) > 3 else 30

lm = lirefs.load(MODEL)
targets = kfac.find_targets(lm.model, layers=LAYERS)


def collect(texts):
    """Curvature on some texts."""
    batches = [lm.pad([ids], side="right") for ids in lm.encode(texts)]
    return kfac.collect(lm.model, batches, targets)


# Sums of other numbers than those of the task, which has two digits.
sums = [f"What is {a} + {b}? Answer: {a + b}" for a in range(101, 131) for b in (117, 246)]
general, arithmetic = collect(lirefs.calibration_texts()[:20]), collect(sums)

tasks = lirefs.default_tasks(lm, limit=ITEMS)
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
    print(f"{cell.variant:22s} {cell.task:22s} {cell.metric:12s} {cell.value}")
