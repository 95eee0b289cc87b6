"""Continue a prompt with several strengths of a direction, on the generated tokens only.

python examples/steer_generation.py [MODEL]
"""

import sys

import lirefs

lm = lirefs.load(sys.argv[1] if len(sys.argv) > 1 else "smollm2-135m")
probe = lirefs.fit(lm, lirefs.load_questions().split(seed=0), shuffles=10)
prompt = "Q: A farmer has 12 cows and sells 5. How many are left?\nA:"
print("unsteered:", lm.generate(prompt, max_new_tokens=20))
for strength in (-1.0, 1.0):
    with probe.best.steer("add", strength, scope="generated").apply(lm.model):
        print(f"{strength:+}:", lm.generate(prompt, max_new_tokens=20))
