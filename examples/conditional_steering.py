"""Steer only where a probe says so: prompts that look like recall are pushed towards reasoning.

python examples/conditional_steering.py [MODEL]
"""

import sys

import lirefs
from lirefs.strength import Gate

lm = lirefs.load(sys.argv[1] if len(sys.argv) > 1 else "smollm2-135m")
probe = lirefs.fit(lm, lirefs.load_questions().split(seed=0), shuffles=10)
direction = probe.best
gate = Gate(direction, above=False, per="row")  # the memory side of the class means
prompts = ["Q: Who wrote Hamlet?\nA:", "Q: I have 3 bags of 4 apples. How many apples?\nA:"]
plain = lm.generate(prompts, max_new_tokens=15)
with direction.steer("add", 2.0, gate=gate).apply(lm.model):
    steered = lm.generate(prompts, max_new_tokens=15)
for prompt, before, after in zip(prompts, plain, steered, strict=True):
    print(prompt, "->", before, "|", after)
