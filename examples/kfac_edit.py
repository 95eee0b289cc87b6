"""Remove the flat directions of a model's weights, look at what was kept, and save the result.

python examples/kfac_edit.py [MODEL [LAYERS [FOLDER]]]
"""

import sys

import kfac
import lirefs

MODEL = sys.argv[1] if len(sys.argv) > 1 else "smollm2-135m"
LAYERS = [int(x) for x in sys.argv[2].split(",")] if len(sys.argv) > 2 else [20, 21, 22]
PROMPT = "We hold these truths to be self-evident, that all men are"

lm = lirefs.load(MODEL)
batches = [lm.pad([ids], side="right") for ids in lm.encode(lirefs.calibration_texts()[:20])]
factors = kfac.collect(lm.model, batches, kfac.find_targets(lm.model, layers=LAYERS))

# A sweep: the weights are rotated once, each value of keep costs a mask and two products.
edit = kfac.CurvatureEdit(factors, keep=0.9)
for keep in (0.95, 0.9, 0.8, 0.7):
    with edit.with_keep(keep).apply(lm.model):
        print(f"keep {keep}: {lm.generate(PROMPT, max_new_tokens=12)!r}")

# Inside the block the model was edited; here it is as before. What does an edit keep?
for row in edit.report(lm.model):
    print(
        f"{row.name}: {row.kept_share:.1%} of the pairs hold {row.kept_mass:.1%} of the mass, "
        f"weight change {row.relative_change:.2f}"
    )

# For good: the folder loads in plain transformers.
if len(sys.argv) > 3:
    edit.bake(lm.model)
    lm.model.save_pretrained(sys.argv[3])
    lm.tokenizer.save_pretrained(sys.argv[3])
