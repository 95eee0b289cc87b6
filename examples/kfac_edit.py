"""Remove the flat directions of a model's weights, see what was kept, and save the result.

    python examples/kfac_edit.py [--model NAME] [--out FOLDER]

Takes a minute on two cores.
"""

import argparse

import kfac
import lirefs

PROMPT = "We hold these truths to be self-evident, that all men are"

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--model", default="smollm2-135m", help="built-in name, hub id or folder")
parser.add_argument("--out", default="edited-model", help="folder to write")
options = parser.parse_args()

lm = lirefs.load(options.model)
layers = range(lm.n_layers)[lm.n_layers * 2 // 3 :][:3]  # as in the paper, from two thirds on
factors = kfac.collect(lm, lirefs.calibration_texts()[:20], layers=layers)

# A sweep: the weights are rotated once, and each value of keep costs a mask and two products.
edit = kfac.CurvatureEdit(factors, keep=0.9)
print(f"unedited: {lm.generate(PROMPT, max_new_tokens=12)!r}")
for keep in (0.95, 0.9, 0.8, 0.7):
    with edit.with_keep(keep).apply(lm.model):
        print(f"keep {keep}: {lm.generate(PROMPT, max_new_tokens=12)!r}")

# The model was edited only inside the block. What does keep 0.9 keep?
for row in edit.report(lm.model):
    print(
        f"{row.name}: {row.kept_share:.1%} of the pairs hold {row.kept_mass:.1%} of the mass, "
        f"weight change {row.relative_change:.2f}"
    )

# Make the edit permanent: the folder loads in plain transformers.
edit.bake(lm.model)
lm.model.save_pretrained(options.out)
lm.tokenizer.save_pretrained(options.out)
print(f"wrote {options.out}: the model at keep 0.9, for AutoModelForCausalLM.from_pretrained")
