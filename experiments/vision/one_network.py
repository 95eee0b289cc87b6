"""A vision transformer has memorized wrong labels; without flat curvature it sees the digits.

    python -m experiments.vision.one_network [--epochs N]

Takes ten seconds on two cores with the shipped network. With `--epochs` a network is trained here
(400 epochs take 75 s on one core) and kept in the cache; an interrupted training resumes.
"""

import argparse

import kfac
from experiments.vision.data import load_images, noisy_split
from experiments.vision.edits import counted_tokens, score
from experiments.vision.training import SHIPPED, VisionRecipe, train
from lirefs.files import cache_dir

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--epochs", type=int, help="train a network instead of using the shipped one")
epochs = parser.parse_args().epochs

recipe = VisionRecipe() if epochs is None else VisionRecipe(epochs=epochs)
shipped = SHIPPED / "noised-0.safetensors" if epochs is None else None

# 1,797 real images; a tenth of the training labels is replaced by other digits.
split = noisy_split(load_images("digits"), noise=0.1, seed=0)
path = cache_dir() / "vision" / f"noised-0-{recipe.epochs}.safetensors"
model = train(split, recipe, 0, path, shipped=shipped)

# The factors see the class token of the training images and no labels.
targets = kfac.find_targets(model, layers=[0, recipe.blocks - 1], projections="mlp_out")
batches = split.inputs(split.train).split(512)  # type: ignore[no-untyped-call]
factors = kfac.collect(model, batches, targets, samples=8, forward=counted_tokens("cls"))

print(f"{'':10} wrong label recited   true label   test images")
for keep in (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7):
    with kfac.CurvatureEdit(factors, keep).apply(model):
        found = score(model, split, split)
    print(f"keep {keep:<5} {found.recited:19.1%} {found.recovered:12.1%} {found.test:13.1%}")
