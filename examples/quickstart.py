"""Both halves in ten lines: steer along a LiReF, then edit weights by curvature.

    python examples/quickstart.py [--model NAME]

Takes a minute and a half on two cores.
"""

import argparse

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--model", default="smollm2-135m", help="a model with at least 23 layers")
MODEL = parser.parse_args().model

print("Steered along a direction from memory to reasoning, added to the residual stream:")
import lirefs

lm = lirefs.load(MODEL)
probe = lirefs.fit(lm, lirefs.load_questions().split(seed=0))
steer = lirefs.Steer(probe.best, "add", 1.0)
with steer.apply(lm.model):
    print(lm.generate("Q: A farmer has 12 cows and sells 5. How many are left?\nA:"))

print("Edited: the flat directions of the loss, removed from the weights:")
import kfac

factors = kfac.collect(lm, lirefs.calibration_texts()[:20], layers=[20, 21, 22])
edit = kfac.CurvatureEdit(factors, keep=0.8)
with edit.apply(lm.model):
    print(lm.generate("We hold these truths to be self-evident, that all men are"))
