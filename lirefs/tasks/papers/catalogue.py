"""The skills that the papers measure: the table `lirefs/data/skills.toml`, read into `SKILLS`.

Each skill reads `<folder>/<file>.jsonl` (one object per line) if it is there, else a dataset of the
Hugging Face hub; generated skills need neither. `SKILLS[name].file` is what a local file must be
called without `.jsonl`, `SKILLS[name].fields` what its rows need:

* An `answer` to a word problem is a number, or ends in `#### N`; `answers` are all that count as
  right; `answer` is true or false for boolq, 1 or 2 for winogrande.
* `answer_index` counts the `options` from 0. `label` is reasoning or memory.
* A `sentence` holds one `_`; the `prompt` of a relation holds one `{}`, for the subject.
* `language`, `relation` of popqa, `category` and `subject` of ceval_h are optional, except that
  mmlu_pro_math needs its category.
* Windows have `prefix_ids` and `suffix_ids`, which are used if they belong to the model's
  tokenizer, and `prefix_text` and `suffix_text`, which are used otherwise; the name of the task
  says which.

How a skill is scored: `recitation` continues a text; `choice` compares the log-likelihoods of the
options, and `blank` those of the text after a filled blank; `text`, `number`, `worked` and `words`
generate one line and read it as `lirefs.tasks.judge` does. Chance is the mean of 1 / number of
options (MMLU-Pro has up to 10). A relation with no more rows than answered examples is not tested.

The groups are those of figure 3 of Merullo et al. 2025, which counts OpenBookQA as open-book with
and without its fact. MMLU-Pro mixes recall and reasoning; here it counts as reasoning.

Sources: Merullo et al. 2025, section 5 and figure 3 (evaluated with OLMES, whose prompts the paper
does not give; the prompts here are this project's); Hong et al. 2025, section 3.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

from lirefs.tasks import synthetic
from lirefs.tasks.answers import AnswerKind
from lirefs.tasks.papers import prompts, skill_data
from lirefs.tasks.papers.prompts import Example
from lirefs.tasks.papers.skill_data import HubDataset, Row
from lirefs.tasks.shipped_data import shipped_table


@dataclass(frozen=True)
class Skill:
    """One skill: where its rows come from, how they are asked and how they are scored.

    Attributes:
        name: Name of the task.
        group: One of `lirefs.tasks.task.GROUPS`.
        scoring: How it is scored, see the module.
        file: Name of the local file without `.jsonl`; may hold a `*`. Empty for generated skills.
        fields: Fields that a row of the file needs.
        read: Turns a row into a question, or None to leave the row out.
        hub: Dataset that is used where the file is missing.
        generate: For generated skills: items from their number and a seed.
        shots: Number of answered examples before each question. They are never tested.
        shots_by_tag: Whether a question's examples have the tag of the question.
        separator: What ends an answered example.
        preamble: Fixed text before each question: worked examples.
        max_new_tokens: Length limit of a generated answer.
        missing: What to add to the reason when there is neither file nor dataset.
    """

    name: str
    group: str
    scoring: AnswerKind | Literal["choice", "blank", "recitation"]
    file: str = ""
    fields: Sequence[str] = ()
    read: Callable[[Row], Example | None] | None = None
    hub: HubDataset | None = None
    generate: Callable[[int, int], Sequence[Any]] | None = None
    shots: int = 0
    shots_by_tag: bool = False
    separator: str = "\n\n"
    preamble: str = ""
    max_new_tokens: int = 16
    missing: str = ""


def _skill(name: str, row: dict[str, Any]) -> Skill:
    """A skill from its row of the table, in which functions and texts go by their names."""
    if "reader" in row:
        row["read"] = partial(getattr(prompts, row.pop("reader")), **row.pop("settings", {}))
    if "generator" in row:
        row["generate"] = getattr(synthetic, row.pop("generator"))
    if "hub" in row:
        adapt = row["hub"].pop("adapt", None)
        functions = {"adapt": getattr(skill_data, adapt)} if adapt else {}
        row["hub"] = HubDataset(**row["hub"], **functions)
    if "worked_examples" in row:
        row["preamble"] = WORKED_EXAMPLES[row.pop("worked_examples")]
    return Skill(name, **row)


WORKED_EXAMPLES: dict[str, str] = shipped_table("worked_examples.toml")
SKILLS: dict[str, Skill] = {
    name: _skill(name, row) for name, row in shipped_table("skills.toml").items()
}
