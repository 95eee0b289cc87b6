"""Find recited texts without a label: how much of a text lies in flat directions of the loss.

python examples/detect_recitation.py [MODEL [LAYERS]]
"""

import sys

import kfac
import lirefs

MODEL = sys.argv[1] if len(sys.argv) > 1 else "smollm2-135m"
LAYERS = [int(x) for x in sys.argv[2].split(",")] if len(sys.argv) > 2 else [20, 21, 22]
TEXTS = [
    "All persons born or naturalized in the United States, and subject to the jurisdiction "
    "thereof, are citizens of the United States and of the State wherein they reside.",
    "My neighbour's tortoise has learned to open the gate, so every Thursday we find it halfway "
    "down the lane, eating somebody else's lettuce.",
]

lm = lirefs.load(MODEL)
batches = [lm.pad([ids], side="right") for ids in lm.encode(lirefs.calibration_texts()[:20])]
factors = kfac.collect(lm.model, batches, kfac.find_targets(lm.model, layers=LAYERS))

scores = kfac.score_recitation(lm.model, [lm.pad(lm.encode(TEXTS), side="right")], factors)
for text, score, tokens in zip(TEXTS, scores.passages, scores.tokens, strict=True):
    words = [lm.tokenizer.decode([token]) for token in lm.encode([text])[0]]
    top = sorted(zip(tokens, words, strict=True), reverse=True)[:3]
    print(f"{score:.4f}  {text[:60]!r}, most at {[word for _, word in top]}")
