"""What is shipped: rounded weights with a model card that says where they come from."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from lirefs.files import atomic_write_text
from lirefs.model.loading import load
from lirefs.organism.language import (
    EXCEPTION_COUNTS,
    EXCEPTION_SKILLS,
    PLANTED,
    TALE_COUNTS,
    Language,
)
from lirefs.organism.people import FOLLOWED, FREQUENCIES, PEOPLE_PER_FREQUENCY
from lirefs.organism.training.checkpoint import save_model
from lirefs.organism.training.scores import organism_scores

CARD = """---
license: apache-2.0
tags: [model-organism, interpretability, memorization]
---
# Model organism (seed {seed})

A {parameters:.1f} M parameter Llama-style decoder trained on a language made up for it, in which it
is known what was memorized and what must be computed. Stored as bfloat16. Not a model of English.

## Data

* {planted} planted sequences of random words, and as many of the same make that were never shown.
* {tales} tales: stories shown exactly {tale_counts} times, each with a twin that was never shown.
* {facts} facts about {people} people at a relative frequency of {frequencies}.
* {exceptions} exceptions: reasoning items shown with a wrong answer only, exactly
  {exception_counts} times ({skills}).
* Conflicts: passages that contradict a common fact. Training followed them in {followed} of cases.
* Arithmetic, boolean expressions, age order, object tracking, passages about strangers, copies,
  short stories.

## Recipe

```json
{recipe}
```

## Scores on test items (greedy, the whole answer must agree)

| item | score |
|---|---|
{table}

A score is the share of items answered as expected. "exception" is the memorized label and
"exception true" the true one; "conflict" follows the passage and "conflict recalled" the stored
fact; "fact xN" is a fact shown N times as often as the rarest, "tale xN" a tale shown N times,
"twin xN" its twin. "reasoning" and "memory" are the classes of a form of the question sets.
"""


def ship_organism(
    out: Path,
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    language: Language,
    recipe: dict[str, object],
) -> dict[str, float]:
    """Write the shipped folder: bfloat16 weights, tokenizer, `scores.json` and model card.

    Returns the scores on test items, which are those of the weights as rounded.
    """
    out.mkdir(parents=True, exist_ok=True)
    save_model(out, model, tokenizer, torch.bfloat16)
    lm = load(out, device="cpu", dtype=torch.float32)
    found = {
        "validation": organism_scores(lm, language, "validation"),
        "test": organism_scores(lm, language, "test"),
    }
    atomic_write_text(out / "scores.json", json.dumps(found, indent=2) + "\n")
    card = CARD.format(
        seed=language.seed,
        parameters=sum(p.numel() for p in model.parameters()) / 1e6,
        planted=PLANTED,
        facts=len(language.facts),
        people=len(FREQUENCIES) * PEOPLE_PER_FREQUENCY,
        frequencies=_listed(FREQUENCIES),
        tales=len(language.tales),
        tale_counts=_listed(TALE_COUNTS),
        exceptions=len(language.exceptions),
        exception_counts=_listed(EXCEPTION_COUNTS),
        skills=", ".join(EXCEPTION_SKILLS),
        followed=", ".join(f"{share:.0%} ({name})" for name, share in FOLLOWED.items()),
        recipe=json.dumps(recipe, indent=2),
        table="\n".join(f"| {name} | {value:.4g} |" for name, value in found["test"].items()),
    )
    atomic_write_text(out / "README.md", card)
    return found["test"]


def _listed(numbers: Sequence[int]) -> str:
    return f"{', '.join(map(str, numbers[:-1]))} or {numbers[-1]}"
