"""Write recitation items as a task folder of lm-evaluation-harness."""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lirefs.errors import TaskError
from lirefs.files import atomic_write_text
from lirefs.tasks.recitation import levenshtein

_YAML = """\
# Recitation: greedy continuation of a prefix, compared token by token with its suffix in training.
task: {name}
custom_dataset: !function {name}_utils.load
test_split: test
output_type: generate_until
doc_to_text: prefix
doc_to_target: suffix
target_delimiter: ""
generation_kwargs: {{until: [], max_gen_toks: {tokens}, do_sample: false}}
process_results: !function {name}_utils.process_results
metric_list:
  - {{metric: strict, aggregation: mean, higher_is_better: true}}
  - {{metric: loose, aggregation: mean, higher_is_better: true}}
  - {{metric: levenshtein, aggregation: mean, higher_is_better: false}}
metadata: {{version: 1.0}}
"""

_UTILS = """\
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from datasets import Dataset
from transformers import AutoTokenizer

HERE = Path(__file__).parent
TOKENIZER = AutoTokenizer.from_pretrained(HERE / "{name}_tokenizer")


def load(**_: Any) -> dict[str, Dataset]:
    with (HERE / "{name}.jsonl").open(encoding="utf-8") as file:
        return {{"test": Dataset.from_list([json.loads(line) for line in file])}}


def process_results(doc: dict[str, Any], results: list[str]) -> dict[str, float]:
    # The output as tokens: what it adds to the prefix, to the length of the suffix.
    start, length = len(doc["prefix_ids"]), len(doc["suffix_ids"])
    output = TOKENIZER.encode(doc["prefix"] + results[0])[start : start + length]
    distance = levenshtein(output, doc["suffix_ids"]) / length
    return {{
        "strict": float(distance == 0),
        "loose": float(1 - distance >= 0.75),
        "levenshtein": distance,
    }}


{levenshtein}"""


def write_lm_eval_task(
    folder: str | Path,
    name: str,
    items: Sequence[tuple[str, Sequence[int], Sequence[int]]],
    tokenizer: Any,
) -> int:
    """Write recitation items as a task that lm-eval runs, with the scores of `Recitation`.

    The folder then holds `NAME.yaml`, `NAME.jsonl`, `NAME_utils.py` and `NAME_tokenizer/`, and
    `lm_eval --include_path FOLDER --tasks NAME` needs nothing else. lm-eval passes on text, not
    tokens, so an item is written only if the tokenizer turns its text into the same tokens again.
    (For the same reason, the distance of an output whose text has other tokens than the model
    generated may differ; an output that recites its suffix always counts.)

    Args:
        folder: Created if missing; files of these names in it are replaced.
        name: Name of the task: letters, digits and underscores.
        items: (id, prefix ids, suffix ids), as in `Recitation`.
        tokenizer: The tokenizer of these ids.

    Returns:
        How many items were left out because their text has other tokens.

    Raises:
        TaskError: The name has other characters, or no item is left.
    """
    if not re.fullmatch(r"[A-Za-z]\w*", name, re.ASCII):
        raise TaskError(f"{name!r} cannot name a task: use letters, digits and underscores")
    rows = []
    for item, prefix, suffix in items:
        whole = tokenizer.decode([*prefix, *suffix], skip_special_tokens=True)
        text = tokenizer.decode(list(prefix), skip_special_tokens=True)
        same = tokenizer.encode(text) == list(prefix) and whole.startswith(text)
        if same and tokenizer.encode(whole) == [*prefix, *suffix]:
            row = {"id": item, "prefix": text, "suffix": whole[len(text) :]}
            rows.append({**row, "prefix_ids": list(prefix), "suffix_ids": list(suffix)})
    if not rows:
        raise TaskError(f"{name}: none of {len(items)} items has a text with the same tokens")
    folder = Path(folder)
    tokenizer.save_pretrained(folder / f"{name}_tokenizer")
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
    atomic_write_text(folder / f"{name}.jsonl", "".join(lines))
    utils = _UTILS.format(name=name, levenshtein=inspect.getsource(levenshtein))
    atomic_write_text(folder / f"{name}_utils.py", utils)
    tokens = max(len(row["suffix_ids"]) for row in rows)
    atomic_write_text(folder / f"{name}.yaml", _YAML.format(name=name, tokens=tokens))
    return len(items) - len(rows)
