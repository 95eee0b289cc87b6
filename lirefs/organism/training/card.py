"""What is shipped: rounded weights with a model card that says where they come from."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from lirefs.files import atomic_write_text
from lirefs.model.loading import load
from lirefs.organism.language import EXCEPTION_SKILLS, EXCEPTIONS_PER_SKILL, PLANTED, Language
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
* {facts} facts about {people} people at relative frequencies {frequencies}.
* {exceptions} exceptions: reasoning items always shown with a wrong answer ({skills}).
* Conflicts: passages that contradict a common fact. Training followed them in {followed} of cases.
* Arithmetic, boolean expressions, age order, object tracking, passages about strangers (one and two
  steps), copies, short stories.

## Recipe

```json
{recipe}
```

## Scores on test items (greedy, the whole answer must agree)

| item | score |
|---|---|
{table}

A score named after one kind of item is the share answered as the column of the same name says:
"exception" is the memorized label and "exception true" the true one; "conflict" follows the passage
and "conflict recalled" the stored fact; "fact xN" is a fact shown N times as often as the rarest.
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
        frequencies=", ".join(map(str, FREQUENCIES)),
        exceptions=EXCEPTIONS_PER_SKILL * len(EXCEPTION_SKILLS),
        skills=", ".join(EXCEPTION_SKILLS),
        followed=", ".join(f"{share:.0%} ({name})" for name, share in FOLLOWED.items()),
        recipe=json.dumps(recipe, indent=2),
        table="\n".join(f"| {name} | {value:.4g} |" for name, value in found["test"].items()),
    )
    atomic_write_text(out / "README.md", card)
    return found["test"]
