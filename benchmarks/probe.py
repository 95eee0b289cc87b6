"""Which estimator is best, does it transfer, is it more than luck: three figures, with numbers.

    python benchmarks/probe.py --questions FILE --gsm8k FILE --relations FILE

Directions are fitted on the first file's labelled questions. The other set, for transfer, is GSM8K
(reasoning) against factual relations (memory).
"""

import argparse
import json
import random
import time
from pathlib import Path

import lirefs
from lirefs.directions import figures as probe_plots
from lirefs.directions import geometry
from lirefs.files import atomic_write_text, cache_dir, read_jsonl, refuse_foreign
from lirefs.questions import Question, Questions

# Estimator and number of shuffles; each shuffle fits every layer again.
FIGURES = ("estimators", "transfer", "null")
ESTIMATORS = {
    "mean difference": (lirefs.MeanDifference(), 200),
    "whitened": (lirefs.WhitenedMeanDifference(), 20),
    "logistic": (lirefs.LogisticDirection(C=0.01), 20),
    "ridge": (lirefs.RidgeDirection(), 20),
    "PCA of pairs": (lirefs.PCADirection(), 20),
}


def balanced(items: list[Question], limit: int, source: str) -> Questions:
    """At most `limit` questions, half of each label."""
    chosen = []
    for label in ("memory", "reasoning"):
        side = [item for item in items if item.label == label]
        chosen += random.Random(0).sample(side, min(limit // 2, len(side)))
    return Questions(chosen, source)


def arithmetic_against_relations(gsm8k: Path, relations: Path) -> list[Question]:
    """GSM8K questions (reasoning) and factual relations (memory)."""
    reasoning = [Question(row["question"], "reasoning", f"g{n}") for n, row in read_jsonl(gsm8k)]
    memory = [Question(row["prompt"], "memory", f"r{n}") for n, row in read_jsonl(relations)]
    return reasoning + memory


def main() -> None:
    """Fit every estimator on one set, score it on the other, and draw."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument(
        "--questions", type=Path, required=True, help="JSON Lines of labelled questions"
    )
    parser.add_argument("--gsm8k", type=Path, required=True)
    parser.add_argument("--relations", type=Path, required=True)
    parser.add_argument("--limit", type=int, default=500, help="questions per set")
    parser.add_argument("--out", type=Path, default=Path("benchmark-probe"))
    arguments = parser.parse_args()
    files = [f"{name}.{kind}" for name in FIGURES for kind in ("png", "svg")]
    refuse_foreign(arguments.out / "probe.json", '"null"', files)
    asked = balanced(list(lirefs.load_questions(arguments.questions)), arguments.limit, "MMLU")
    pairs = arithmetic_against_relations(arguments.gsm8k, arguments.relations)
    other = balanced(pairs, min(arguments.limit, 200), "GSM8K against relations")
    split = asked.split(seed=0)
    lm = lirefs.load(arguments.model)
    cache = cache_dir() / "activations"
    probes, moved, table = {}, {}, {}
    for name, (estimator, shuffles) in ESTIMATORS.items():
        start = time.perf_counter()
        probe = lirefs.fit(lm, split, estimator, shuffles=shuffles, cache=cache, progress=False)
        seconds = time.perf_counter() - start
        probes[name] = probe
        if name in ("mean difference", "whitened"):
            moved[name] = geometry.transfer(lm, probe.directions, other, split, progress=False)
        table[name] = {**probe.to_dict(), "null": probe.null, "seconds": seconds}
        best = probe.best_scores
        print(
            f"{name:16} layer {probe.best_layer:2} test {best.test_auroc} (n = {best.test_auroc.n})"
            f" accuracy {best.test_accuracy} null {probe.shuffled} random {best.random_auroc}"
            f" p {probe.p_value:.3f} [{seconds:.0f} s]",
            flush=True,
        )
        if name in moved:
            place = moved[name].layers.index(probe.best_layer)
            random_there = moved[name].random[place]
            print(f"{'':16} on {other.source}: {moved[name].auroc[place]}, random {random_there}")
    pictures = (
        probe_plots.best_layer_figure(probes),
        probe_plots.transfer_bars(probes["mean difference"], moved),
        probe_plots.probe_by_layer(probes["mean difference"]),
    )
    for name, picture in zip(FIGURES, pictures, strict=True):
        picture.save(arguments.out, name)
    atomic_write_text(arguments.out / "probe.json", json.dumps(table, indent=2))


if __name__ == "__main__":
    main()
