"""Compare methods fairly: at equal perplexity, at equal forgetting, chosen on validation items.

python examples/compare_methods.py [ITEMS [FOLDER]]
"""

import math
import sys
from pathlib import Path

import kfac
import lirefs
from lirefs.harness.sweep_plots import pareto_fronts
from lirefs.harness.sweeps import choose_on_validation, matched, matched_difference
from lirefs.organism.language import Language
from lirefs.organism.suite import organism_questions, organism_tasks, training_texts
from lirefs.statistics import Estimate

ITEMS = int(sys.argv[1]) if len(sys.argv) > 1 else 60
FOLDER = Path(sys.argv[2] if len(sys.argv) > 2 else "compare-methods")
RECITED, FACTS, SKILL, LANGUAGE = "planted sequences", "rare facts", "addition", "stories"


def shown(estimate: Estimate, spec: str = ".2f") -> str:
    """An estimate, or that a sweep does not go so far: nothing is extrapolated."""
    return format(estimate, spec) if math.isfinite(estimate.value) else "not reached"


lm, language = lirefs.load("organism"), Language()
direction = lirefs.fit(lm, organism_questions("passage", language, 60).split()).best
texts = lm.encode(training_texts(language, 10 * ITEMS))
batches = [lm.pad(texts[i : i + 8], side="right") for i in range(0, len(texts), 8)]
factors = kfac.collect(lm.model, batches, kfac.find_targets(lm.model))

# A sweep: settings from the one nearest to the unchanged model outward.
edit, svd = kfac.CurvatureEdit(factors, keep=1.0), kfac.SVDEdit(factors.names, keep=1.0)
variants, sweeps = {}, {}
for method, settings in {
    "K-FAC": [(1 - keep, edit.with_keep(keep)) for keep in (0.998, 0.995, 0.99, 0.98, 0.95)],
    "SVD": [(1 - keep, svd.with_keep(keep)) for keep in (0.9, 0.8, 0.7, 0.6, 0.5)],
    "LiReF add": [(a, direction.steer("add", a)) for a in (1.0, 2.0, 4.0, 8.0)],
}.items():
    sweeps[method] = [(strength, f"{method} {strength:.3g}") for strength, _ in settings]
    variants |= {name: one for (_, name), (_, one) in zip(sweeps[method], settings, strict=True)}

wanted = (RECITED, FACTS, SKILL, LANGUAGE)
found = {
    side: lirefs.compare(lm, variants, [one for one in tasks if one.name in wanted])
    for side in ("validation", "test")
    for tasks in [organism_tasks(lm, language, side, ITEMS)]
}
test = found["test"]
for method, settings in sweeps.items():
    names = [name for _, name in settings]
    best = choose_on_validation(found["validation"], test, FACTS, names)
    print(
        f"{method}: best on validation {best.variant!r}; {FACTS} on test items {best.test}, change "
        f"{best.difference:+.3f}, p = {best.p_value:.3f}. On validation items it gained "
        f"{best.best_of.observed:+.3f}; by luck alone the best of {best.best_of.k} gains "
        f"{best.best_of.luck:+.3f}"
    )
for words, by, goals in (
    ("perplexity over the unchanged model's", LANGUAGE, (1.02, 1.05, 1.2)),
    ("share recited", RECITED, (0.5, 0.1)),
):
    for task in (RECITED, FACTS, SKILL):
        if task == by:
            continue
        scores = matched(test, sweeps, task, by, goals)
        gaps = matched_difference(test, sweeps, task, by, goals, "K-FAC", "SVD")
        for place, goal in enumerate(goals):
            row = "; ".join(f"{method} {shown(values[place])}" for method, values in scores.items())
            print(f"{words} {goal:g}, {task}: {row}; K-FAC minus SVD {shown(gaps[place], '+.2f')}")

FOLDER.mkdir(parents=True, exist_ok=True)
labels = ("perplexity over the unchanged model's", "share recited")
fronts = pareto_fronts(test, sweeps, RECITED, LANGUAGE, labels, larger_is_better=False)
fronts.save(FOLDER, "pareto")
print(test.save(FOLDER))
