"""Fit a direction with two estimators, look at its controls, and save it.

python examples/fit_direction.py [MODEL] [FILE]
"""

import sys

import lirefs

model = sys.argv[1] if len(sys.argv) > 1 else "smollm2-135m"
file = sys.argv[2] if len(sys.argv) > 2 else "directions.safetensors"

lm = lirefs.load(model)
split = lirefs.load_questions().split(seed=0)
for estimator in (lirefs.MeanDifference(), lirefs.WhitenedMeanDifference(shrinkage=0.5)):
    probe = lirefs.fit(lm, split, estimator, shuffles=10)
    best = probe.best_scores
    print(f"{estimator}: layer {probe.best_layer}, test AUROC {best.test_auroc}")
    print(f"  shuffled labels {probe.shuffled}, random directions {best.random_auroc}")
probe.directions.save(file)
