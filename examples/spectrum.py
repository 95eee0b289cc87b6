"""The spectrum from recitation to reasoning, seen from activations and from curvature at once.

python examples/spectrum.py [MODEL [LIMIT [FIGURE]]]
"""

import sys
from pathlib import Path

import kfac
import lirefs
from lirefs.files import atomic_write_bytes
from lirefs.harness.analysis_plots import two_sided_spectrum
from lirefs.organism.language import Language
from lirefs.organism.suite import organism_questions, organism_tasks, training_texts
from lirefs.studies import spectra

MODEL = sys.argv[1] if len(sys.argv) > 1 else "organism"
LIMIT = int(sys.argv[2]) if len(sys.argv) > 2 else 40
FIGURE = Path(sys.argv[3] if len(sys.argv) > 3 else "spectrum.png")

lm, language = lirefs.load(MODEL), Language()
if MODEL == "organism":
    questions = organism_questions("passage", language, 20 + LIMIT)
    tasks, texts = organism_tasks(lm, language, "test", LIMIT), training_texts(language, 5 * LIMIT)
    edited, keep = 0, 0.98
else:
    questions = lirefs.load_questions("default")
    tasks, texts = lirefs.default_tasks(lm, limit=LIMIT), lirefs.calibration_texts()[:LIMIT]
    edited, keep = lm.n_layers // 3, 0.8
split = questions.split()
direction = lirefs.fit(lm, split).best
layers = {edited, max(direction.layer - 1, 0), direction.layer}
targets = kfac.find_targets(lm.model, layers, ["gate_proj", "up_proj", "down_proj", "o_proj"])
batches = [lm.pad([ids], side="right") for ids in lm.encode(texts)]
factors = kfac.collect(lm.model, batches, targets)
names = [target.name for target in kfac.find_targets(lm.model, [edited])]
edit = kfac.CurvatureEdit(factors, dict.fromkeys(names, keep))

found = spectra.task_positions(lm, direction, factors, tasks)
title = f"layer {direction.layer}: Spearman {found.spearman:.2f}, n = {found.spearman.n} tasks"
atomic_write_bytes(FIGURE, two_sided_spectrum(found.positions, f"{lm.name}, {title}").png)
print(f"{title}, p = {found.p_value:.3f}; size for random directions {found.random:.2f}, ", end="")
print(f"{found.above_random:.0%} of them below")
for one in found.positions:
    print(f"{one.task:28s} projection {one.projection:.2f}, flat {one.flat}")

for name, move in spectra.edit_moves_projection(lm, direction, edit, split.test).items():
    print(f"{name}: memory {move.memory:+.2f}, reasoning {move.reasoning:+.2f}, ", end="")
    print(f"AUROC {move.auroc_before:.2f}, then {move.auroc_after:.2f}")
for one in spectra.direction_sharpness(lm, [direction], factors, split.train):
    for name, place in (("curvature", one.curvature), ("order", one.order)):
        print(f"{one.target} {one.role}: {name} {place.value:.2f}, ", end="")
        print(f"random {place.isotropic:.2f}, as states vary {place.matched:.2f}")

few = [task for task in tasks if task.group in ("memorization", "conflict", "language")]
comparison = lirefs.compare(lm, spectra.edit_and_steer(edit, direction, 2.0), few)
for cell in comparison.cells():
    print(f"{cell.task:28s} {cell.variant:24s} {cell.value:.2f}")
