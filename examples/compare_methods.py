"""Compare methods fairly: at equal perplexity, at equal forgetting, chosen on validation items.

    python examples/compare_methods.py [--limit N] [--out FOLDER]

Takes two minutes on two cores, half a minute with `--limit 10`, whose intervals are wide.
"""

import argparse
import math
from pathlib import Path

import kfac
import lirefs
from lirefs.comparison import choose_on_validation, matched, matched_difference, pareto_fronts
from lirefs.organism import Language, organism_questions, organism_tasks, training_texts
from lirefs.statistics import Estimate

RECITED, FACTS, SKILL, LANGUAGE = "planted sequences", "rare facts", "addition", "stories"

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--limit", type=int, default=60, help="items of a task")
parser.add_argument("--out", type=Path, default=Path("compare-methods"), help="folder to write")
options = parser.parse_args()


def shown(estimate: Estimate, spec: str = ".2f") -> str:
    """Format an estimate; beyond the end of a sweep there is none, as nothing is extrapolated."""
    if not math.isfinite(estimate.value):
        return "not reached"
    if not math.isfinite(estimate.low + estimate.high):
        return f"{estimate.value:{spec}} [not reached by every resample]"
    return format(estimate, spec)


lm, language = lirefs.load("organism"), Language()
direction = lirefs.fit(lm, organism_questions("passage", language, 60).split(), shuffles=10).best
factors = kfac.collect(lm, training_texts(language, 10 * options.limit))

# A sweep lists its settings from the one nearest to the unchanged model outward.
edit, svd = kfac.CurvatureEdit(factors, keep=1.0), kfac.SVDEdit(factors.names, keep=1.0)
variants, sweeps = {}, {}
for method, settings in {
    "K-FAC": [(1 - keep, edit.with_keep(keep)) for keep in (0.998, 0.995, 0.99, 0.98, 0.95)],
    "SVD": [(1 - keep, svd.with_keep(keep)) for keep in (0.9, 0.8, 0.7, 0.6, 0.5)],
    "LiReF add": [(a, lirefs.Steer(direction, "add", a)) for a in (1.0, 2.0, 4.0, 8.0)],
}.items():
    sweeps[method] = [(strength, f"{method} {strength:.3g}") for strength, _ in settings]
    variants |= {name: one for (_, name), (_, one) in zip(sweeps[method], settings, strict=True)}

wanted = (RECITED, FACTS, SKILL, LANGUAGE)
found = {
    side: lirefs.compare(lm, variants, [one for one in tasks if one.name in wanted])
    for side in ("validation", "test")
    for tasks in [organism_tasks(lm, language, side, options.limit)]
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
    ("perplexity {} times the unchanged model's", LANGUAGE, (1.02, 1.05, 1.2)),
    ("a share recited of {}", RECITED, (0.5, 0.1)),
):
    tasks = [task for task in (RECITED, FACTS, SKILL) if task != by]
    scores = {task: matched(test, sweeps, task, by, goals) for task in tasks}
    gaps = {
        task: matched_difference(test, sweeps, task, by, goals, "K-FAC", "SVD") for task in tasks
    }
    for place, goal in enumerate(goals):
        print(f"at {words.format(goal)}:")
        for task in tasks:
            row = "; ".join(f"{one} {shown(values[place])}" for one, values in scores[task].items())
            print(f"  {task}: {row}; K-FAC minus SVD {shown(gaps[task][place], '+.2f')}")

labels = ("perplexity relative to the unchanged model", "share recited")
fronts = pareto_fronts(test, sweeps, RECITED, LANGUAGE, labels, larger_is_better=False)
print(f"wrote {lirefs.write_report(test, options.out)}")
fronts.save(options.out, "pareto")
print(f"wrote {options.out / 'pareto.png'}")
