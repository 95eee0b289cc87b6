"""Are perturbation-type and counterfactual memorization one thing, and which does an edit take?

python examples/two_memorizations.py [LIMIT]
"""

import sys

import kfac
import lirefs
from lirefs.organism.language import Language
from lirefs.organism.suite import training_texts
from lirefs.studies.counterfactual import memorization_scores, memorized, never_seen

LIMIT = int(sys.argv[1]) if len(sys.argv) > 1 else 90

lm, language = lirefs.load("organism"), Language()
batches = [lm.pad([ids], side="right") for ids in lm.encode(training_texts(language, 3 * LIMIT))]
factors = kfac.collect(lm.model, batches, kfac.find_targets(lm.model, layers=[0]))
edit = kfac.CurvatureEdit(factors, keep=0.98)

for kind in ("planted", "fact", "exception"):
    items = memorized(language, kind, "test", LIMIT)
    scores = memorization_scores(lm, edit, items, never_seen(language, kind, "test", LIMIT))
    print(
        f"{kind}, n = {len(items)}: nats per token lost to a changed prompt "
        f"{scores.perturbation.mean():.2f}, gained by training {scores.counterfactual.mean():.2f}, "
        f"lost to the edit {scores.fall.mean():.2f}"
    )
    for pair, value in scores.correlations.items():
        print(f"  Spearman of {' and '.join(pair)}: {value:.2f}")
