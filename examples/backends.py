"""One direction on three runtimes: transformers, TransformerLens and nnsight.

    python examples/backends.py [--model NAME]

Takes half a minute on two cores. Prints how much the steered logits differ: by rounding only.
"""

import argparse

import torch

import lirefs
from lirefs.export import nnsight as sight
from lirefs.export import transformer_lens as lens

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--model", default="smollm2-135m", help="built-in name, hub id or folder")
options = parser.parse_args()

lm = lirefs.load(options.model)
questions = lirefs.load_questions()[:10]  # five of each label
bridge, model = lens.boot(lm), sight.wrap(lm)

# Fit the direction on states from TransformerLens's cache; lirefs.capture gives the same states.
states = lens.capture(bridge, lm, [one.prompt for one in questions], layers=[2])
labels = [int(one.label == "reasoning") for one in questions]
steer = lirefs.Steer(lirefs.fit_directions(states, labels)[2], "add", 2.0)

tokens = torch.tensor(lm.encode(["The capital of France is"]))
with torch.no_grad():
    plain = lm.model(tokens).logits
    with steer.apply(lm.model):
        ours = lm.model(tokens).logits
    with bridge.hooks(fwd_hooks=lens.hooks(steer, bridge, lm)):
        theirs = bridge(tokens, return_type="logits")
traced = sight.logits(model, lm, tokens, steer)
print(f"steering changes a logit by up to {float((ours - plain).abs().max()):.2g}")
print(f"TransformerLens differs by {float((theirs - ours).abs().max()):.1e}")
print(f"nnsight differs by {float((traced - ours).abs().max()):.1e}")
