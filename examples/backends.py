"""One direction on three runtimes: transformers, TransformerLens and nnsight.

python examples/backends.py [MODEL]
"""

import sys

import torch

import lirefs
from lirefs.backends import nnsight as sight
from lirefs.backends import transformer_lens as lens

lm = lirefs.load(sys.argv[1] if len(sys.argv) > 1 else "smollm2-135m")
questions = lirefs.load_questions()[:10]  # five of each label
bridge, model = lens.boot(lm), sight.wrap(lm)

# The direction is fitted from TransformerLens's caches here; capture and nnsight give the same.
states = lens.capture(bridge, lm, [one.prompt for one in questions], layers=[2])
labels = [int(one.label == "reasoning") for one in questions]
steer = lirefs.fit_directions(states, labels)[2].steer("add", 2.0)

tokens = torch.tensor(lm.encode(["The capital of France is"]))
with torch.no_grad(), steer.apply(lm.model):
    ours = lm.model(tokens).logits
with torch.no_grad(), bridge.hooks(fwd_hooks=lens.hooks(steer, bridge, lm)):
    theirs = bridge(tokens, return_type="logits")
traced = sight.logits(model, lm, tokens, steer)
print("TransformerLens differs by", float((theirs - ours).abs().max()))
print("nnsight differs by", float((traced - ours).abs().max()))
