"""Where tasks lie between recited and clean text, band by band: the K-FAC paper's figure 4.

    python examples/task_bands.py [--limit N] [--out FILE]

Takes a minute on two cores, a quarter of a minute with `--limit 10`. A ratio above 1 means that the
text puts more energy into the flatter half of the directions than the task's prompts do.
"""

import argparse
from pathlib import Path

import kfac
import lirefs
from lirefs.organism import Language, training_texts
from lirefs.organism.language import OFTEN

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--limit", type=int, default=60, help="items per task")
parser.add_argument("--out", type=Path, default=Path("task_bands.png"), help="figure to write")
options = parser.parse_args()
limit = options.limit

lm, language = lirefs.load("organism"), Language()
targets = kfac.find_targets(lm.model, projections=["up_proj"])
factors = kfac.collect(lm, training_texts(language, 5 * limit), targets)


def profile(texts):
    """How much texts put into each band of each layer's input."""
    return kfac.band_profile(lm.model, lm.batches(texts), factors)


def texts_of(kind):
    """Tales that training showed often, or their never-seen twins."""
    items = [item for item in language.items(kind, "test") if item.frequency >= OFTEN]
    return [item.text for item in items[:limit]]


kinds = {"sums": "addition", "facts": "fact", "passages": "open_book", "logic": "boolean"}
ratios = kfac.task_band_ratios(
    {
        name: profile([item.prompt for item in language.items(kind, "test", limit)])
        for name, kind in kinds.items()
    },
    {
        "memorized": profile(texts_of("tale")),
        "their twins": profile(texts_of("twin")),
        "clean": profile(language.texts("test", limit)),
    },
)
print("bottom half of the curvature  " + "  ".join(f"layer {i:<12}" for i in range(lm.n_layers)))
for task, references in ratios.items():
    for reference, one in references.items():
        cells = [f"{v:.2f} [{low:.2f}, {high:.2f}]" for v, low, high in one.ratio[:, :, -1].T]
        print(f"{f'{reference} over {task}':30s}" + "  ".join(cells))
picture = kfac.figures.task_curvature_figure(ratios, range(lm.n_layers))
picture.save(options.out.parent, options.out.stem)
print(f"wrote {options.out.with_suffix('.png')} and .svg")
