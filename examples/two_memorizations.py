"""Are perturbation-type and counterfactual memorization one thing, and which does an edit take?

    python examples/two_memorizations.py [--limit N]

Takes a minute on two cores, a third with `--limit 20`, whose intervals are wide.
"""

import argparse

import kfac
import lirefs
from experiments.counterfactual import memorization_scores, memorized, never_seen
from lirefs.organism import Language, training_texts

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--limit", type=int, default=90, help="items of a kind")
limit = parser.parse_args().limit

lm, language = lirefs.load("organism"), Language()
batches = lm.batches(training_texts(language, 3 * limit))
factors = kfac.collect(lm.model, batches, kfac.find_targets(lm.model, layers=[0]))
edit = kfac.CurvatureEdit(factors, keep=0.98)

for kind in ("planted", "fact", "exception"):
    items = memorized(language, kind, "test", limit)
    scores = memorization_scores(lm, edit, items, never_seen(language, kind, "test", limit))
    print(
        f"{kind}, n = {len(items)}: nats per token lost to a changed prompt "
        f"{scores.perturbation.mean():.2f}, gained by training {scores.counterfactual.mean():.2f}, "
        f"lost to the edit {scores.fall.mean():.2f}"
    )
    for pair, value in scores.correlations.items():
        print(f"  Spearman of {' and '.join(pair)}: {value:.2f}")
