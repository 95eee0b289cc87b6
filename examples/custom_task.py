"""A task of your own next to a built-in one: does an intervention make the model repeat itself?

    python examples/custom_task.py [--model NAME] [--out FOLDER]

Takes a minute on two cores.
"""

import argparse
from dataclasses import dataclass

import kfac
import lirefs
from lirefs.tasks import ItemResult, ItemTask, greedy

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--model", default="smollm2-135m", help="built-in name, hub id or folder")
parser.add_argument("--out", default="custom-task", help="folder of the report")
options = parser.parse_args()


@dataclass(frozen=True)
class Variety(ItemTask):
    """Share of the continuation's tokens that are distinct; 1 means that nothing is repeated."""

    group: str = "language"
    metric: str = "distinct"
    chance: float = 0.0
    tokens: int = 24
    generates = True  # by `greedy` alone, so compare(engine=...) can run it

    def run(self, lm, advance):
        """Score each (id, prompt) by its continuation."""
        outputs = greedy(lm, lm.encode([p for _, p in self.items]), self.tokens, advance=advance)
        return [
            ItemResult(
                id=name,
                scores={"distinct": len(set(output)) / self.tokens},
                prompt=prompt,
                output=lm.tokenizer.decode(output),
            )
            for (name, prompt), output in zip(self.items, outputs, strict=True)
        ]


lm = lirefs.load(options.model)
layers = range(lm.n_layers)[lm.n_layers * 2 // 3 :][:3]  # as in the paper, from two thirds on
factors = kfac.collect(lm, lirefs.calibration_texts()[:20], layers=layers)

openings = ["My favourite meal is", "Last summer we went to", "The best way to learn is"]
yours = [("green", "Grass is", [" green", " loud"], 0), ("wet", "Rain is", [" dry", " wet"], 1)]
tasks = [
    Variety("variety", [(str(i), opening) for i, opening in enumerate(openings)]),
    lirefs.MultipleChoice("common sense", yours, group="closed-book"),
]
variants = {f"keep {keep}": kfac.CurvatureEdit(factors, keep) for keep in (0.95, 0.8, 0.6)}
comparison = lirefs.compare(lm, variants, tasks)
for cell in comparison.cells():
    print(f"{cell.variant:10s} {cell.task:14s} {cell.metric:9s} {cell.value}, n = {cell.value.n}")
print(f"wrote {lirefs.write_report(comparison, options.out)}")
