"""Steer generation towards reasoning or memory, and only where a probe says so.

    python examples/steer_generation.py [--model NAME] [--limit N]

Takes a minute on two cores, a quarter of a minute with `--limit 60`.
"""

import argparse

import lirefs
from lirefs.model import applied

PROMPTS = [
    "Q: Who wrote Hamlet?\nA:",
    "Q: A farmer has 12 cows and sells 5. How many are left?\nA:",
]

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--model", default="smollm2-135m", help="built-in name, hub id or folder")
parser.add_argument("--limit", type=int, help="fit on only this many questions")
options = parser.parse_args()

lm = lirefs.load(options.model)
split = lirefs.Questions(lirefs.load_questions()[: options.limit]).split(seed=0)
direction = lirefs.fit(lm, split, shuffles=10).best
# A gate steers only prompts on one side of the class means: here, the memory side.
gate = lirefs.Gate(direction, above=False, per="row")
variants = {
    "unsteered": None,
    "towards reasoning, generated tokens": lirefs.Steer(direction, "add", 2.0, scope="generated"),
    "towards memory, generated tokens": lirefs.Steer(direction, "add", -2.0, scope="generated"),
    "towards reasoning, recall prompts": lirefs.Steer(direction, "add", 2.0, gate=gate),
}
for name, steer in variants.items():
    with applied(steer, lm.model):
        answers = lm.generate(PROMPTS, max_new_tokens=15)
    print(f"{name}:")
    for prompt, answer in zip(PROMPTS, answers, strict=True):
        print(f"  {prompt!r} -> {answer!r}")
