"""The words of a report that a reader may not know."""

from __future__ import annotations

import re

from lirefs.comparison.summary import Summary

WORDS = {
    "retained": "a variant's score as a share of the unchanged model's on the same items",
    "clear": "different from the unchanged model with p (Holm) below 0.05",
    "LiReF": "a direction in the hidden states, from questions that need memory to questions that "
    "need reasoning; steering moves the states along it while the model runs",
    "K-FAC": "an estimate of the curvature of the loss, by which an edit of the weights removes "
    "what the loss depends on least",
    "SVD": "singular value decomposition; the edit drops the smallest singular values of a matrix",
    "curvature pairs": "the parts into which K-FAC takes a weight matrix apart, one for each pair "
    "of an input and an output direction",
    "add": "steering that adds the direction, times the strength, to every state",
    "amplify": "steering that enlarges the part of a state that lies along the direction",
    "ablate": "steering that removes the part of a state that lies along the direction",
    "strength": "how far steering moves a state; 1 is the distance between the two classes",
    "scope": "which tokens are steered: all of them, or the last one of the prompt",
    "form": "the set of questions that a direction was fitted on: passage, statement, mixed or "
    "exception",
    "keep": "the share of the total curvature that an edit keeps in the weights",
    "gate": "the first of the three matrices of an MLP; the others are called up and down",
    "exceptions": "questions whose memorized answer is false, so that reasoning and recitation "
    "give different answers",
    "conflicts": "questions whose text contradicts a memorized fact, so that reading and "
    "recitation give different answers",
    "AUROC": "how well a score separates two classes: 0.5 is chance, 1 is perfect",
    "bag of words": "a classifier that knows only which words a question has, without a model",
    "perplexity": "how badly a model predicts a text: 1 is perfect",
}
"""Definitions by the words that they define."""


def words_used(summary: Summary) -> list[tuple[str, str]]:
    """The definitions of those words that a report uses."""
    names = (*summary.variants, *summary.tasks, *(one.metric for one in summary.tasks.values()))
    text = "\n".join((*names, *summary.findings, "retained clear"))
    return [
        (word, meaning)
        for word, meaning in WORDS.items()
        if re.search(rf"(?<![a-z]){re.escape(word)}(?![a-z])", text, re.IGNORECASE)
    ]
