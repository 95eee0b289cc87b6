"""The spectrum from recitation to reasoning, seen from activations and from curvature at once.

    python examples/spectrum.py [--model NAME] [--limit N] [--out FILE]

Takes two minutes on two cores, half a minute with `--limit 10`. What the numbers mean:
docs/analyses.md.
"""

import argparse
from pathlib import Path

import kfac
import lirefs
from experiments import sharpness, spectra
from experiments.spectra_plots import two_sided_spectrum
from lirefs.files import atomic_write_bytes
from lirefs.organism import Language, organism_questions, organism_tasks, training_texts

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--model", default="organism", help="built-in name, hub id or folder")
parser.add_argument("--limit", type=int, default=40, help="items of a task")
parser.add_argument("--out", type=Path, default=Path("spectrum.png"), help="figure to write")
options = parser.parse_args()

lm, language, limit = lirefs.load(options.model), Language(), options.limit
if options.model == "organism":
    questions = organism_questions("passage", language, 20 + limit)
    tasks, texts = organism_tasks(lm, language, "test", limit), training_texts(language, 5 * limit)
    edited, keep = 0, 0.98
else:
    questions = lirefs.load_questions("default")
    tasks, texts = lirefs.default_tasks(lm, limit=limit), lirefs.calibration_texts()[:limit]
    edited, keep = lm.n_layers // 3, 0.8
split = questions.split()
direction = lirefs.fit(lm, split).best
layers = {edited, max(direction.layer - 1, 0), direction.layer}
targets = kfac.find_targets(lm.model, layers, ["gate_proj", "up_proj", "down_proj", "o_proj"])
batches = lm.batches(texts)
factors = kfac.collect(lm.model, batches, targets)
names = [target.name for target in kfac.find_targets(lm.model, [edited])]
edit = kfac.CurvatureEdit(factors, dict.fromkeys(names, keep))

found = spectra.task_positions(lm, direction, factors, tasks)
title = f"layer {direction.layer}: Spearman {found.spearman:.2f}, n = {found.spearman.n} tasks"
atomic_write_bytes(options.out, two_sided_spectrum(found.positions, f"{lm.name}, {title}").png)
print(f"{title}, p = {found.p_value:.3f}; size for random directions {found.random:.2f}, ", end="")
print(f"{found.above_random:.0%} of them below")
for one in found.positions:
    print(f"{one.task:28s} projection {one.projection:.2f}, flat {one.flat}")

for name, move in spectra.edit_moves_projection(lm, direction, edit, split.test).items():
    print(f"{name}: memory {move.memory:+.2f}, reasoning {move.reasoning:+.2f}, ", end="")
    print(f"AUROC {move.auroc_before:.2f}, then {move.auroc_after:.2f}")
for one in sharpness.direction_sharpness(lm, [direction], factors, split.train):
    for name, place in (("curvature", one.curvature), ("order", one.order)):
        print(f"{one.target} {one.role}: {name} {place.value:.2f}, ", end="")
        print(f"random {place.isotropic:.2f}, as states vary {place.matched:.2f}")

few = [task for task in tasks if task.group in ("memorization", "conflict", "language")]
comparison = lirefs.compare(lm, spectra.edit_and_steer(edit, direction, 2.0), few)
print(f"{'':28s}" + "".join(f"{variant:>24s}" for variant in comparison.variants))
for task in comparison.tasks:
    values = [comparison.cell(variant, task).value for variant in comparison.variants]
    print(f"{task:28s}" + "".join(f"{f'{value:.2f}':>24s}" for value in values))
print(f"wrote {options.out}")
