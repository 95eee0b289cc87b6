"""Fit a direction with two estimators, check its controls, and save it.

    python examples/fit_direction.py [--model NAME] [--limit N] [--out FILE]

Takes two minutes on two cores, half a minute with `--limit 60`.
"""

import argparse

import lirefs

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--model", default="smollm2-135m", help="built-in name, hub id or folder")
parser.add_argument("--limit", type=int, help="use only this many questions")
parser.add_argument("--out", default="directions.safetensors", help="file to write")
options = parser.parse_args()

lm = lirefs.load(options.model)
split = lirefs.Questions(lirefs.load_questions()[: options.limit]).split(seed=0)
for estimator in (lirefs.MeanDifference(), lirefs.WhitenedMeanDifference(shrinkage=0.5)):
    probe = lirefs.fit(lm, split, estimator, shuffles=10)
    best = probe.best_scores
    print(f"{estimator}: layer {probe.best_layer}, test AUROC {best.test_auroc}")
    print(f"  shuffled labels {probe.shuffled}, random directions {best.random_auroc}")

probe.directions.save(options.out)
read = lirefs.Directions.load(options.out)
print(f"wrote {options.out}: {len(read)} directions of the second estimator, one per layer")
