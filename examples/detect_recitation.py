"""Find recited texts without labels: how much of a text lies in flat directions of the loss.

    python examples/detect_recitation.py [--model NAME]

Takes half a minute on two cores. Prints each text's share, which is larger for recited text, and
the words with the largest shares.
"""

import argparse

import kfac
import lirefs

TEXTS = [
    "All persons born or naturalized in the United States, and subject to the jurisdiction "
    "thereof, are citizens of the United States and of the State wherein they reside.",
    "My neighbour's tortoise has learned to open the gate, so every Thursday we find it halfway "
    "down the lane, eating somebody else's lettuce.",
]

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--model", default="smollm2-135m", help="built-in name, hub id or folder")
options = parser.parse_args()

lm = lirefs.load(options.model)
layers = range(lm.n_layers)[lm.n_layers * 2 // 3 :][:3]  # as in the paper, from two thirds on
factors = kfac.collect(lm, lirefs.calibration_texts()[:20], layers=layers)

scores = kfac.flat_shares(lm.model, lm.batches(TEXTS), factors)
for text, score, tokens in zip(TEXTS, scores.passages, scores.tokens, strict=True):
    words = [lm.tokenizer.decode([token]) for token in lm.encode([text])[0]]
    top = sorted(zip(tokens, words, strict=True), reverse=True)[:3]
    print(f"{score:.4f}  {text[:60]!r}, most at {[word for _, word in top]}")
