"""Where tasks lie between recited and clean text, band by band: the K-FAC paper's figure 4.

python examples/task_bands.py [ITEMS [FIGURE]]
"""

import sys
from pathlib import Path

import kfac
import lirefs
from lirefs.files import atomic_write_bytes
from lirefs.organism.language import Language
from lirefs.organism.suite import training_texts

ITEMS = int(sys.argv[1]) if len(sys.argv) > 1 else 60
FIGURE = Path(sys.argv[2] if len(sys.argv) > 2 else "task_bands.png")

lm, language = lirefs.load("organism"), Language()


def batches(texts):
    """One text a batch."""
    return [lm.pad([ids], side="right") for ids in lm.encode(texts)]


targets = kfac.find_targets(lm.model, projections=["up_proj"])
factors = kfac.collect(lm.model, batches(training_texts(language, 5 * ITEMS)), targets)


def profile(texts):
    """What texts put into each band of each layer's input."""
    return kfac.band_profile(lm.model, batches(texts), factors)


kinds = {"sums": "addition", "facts": "fact", "passages": "open_book", "logic": "boolean"}
ratios = kfac.task_ratios(
    {
        name: profile([item.prompt for item in language.items(kind, "test", ITEMS)])
        for name, kind in kinds.items()
    },
    {
        "memorized": profile([item.text for item in language.items("planted", "test", ITEMS)]),
        "never seen": profile([item.text for item in language.items("unseen", "test", ITEMS)]),
        "clean": profile(language.texts("test", ITEMS)),
    },
)
for task, references in ratios.items():
    for reference, one in references.items():
        for layer in range(lm.n_layers):
            top, bottom = one.ratio[:, layer, 0], one.ratio[:, layer, -1]
            print(
                f"{reference} over {task}, layer {layer}: "
                f"top 10 % {top[0]:.2f} [{top[1]:.2f}, {top[2]:.2f}], "
                f"bottom half {bottom[0]:.2f} [{bottom[1]:.2f}, {bottom[2]:.2f}]"
            )
atomic_write_bytes(FIGURE, kfac.plots.task_curvature(ratios, range(lm.n_layers)))
