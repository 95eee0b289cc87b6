"""Local tasks for lm-evaluation-harness, and both kinds of models that answer them."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
import torch
from tiny import fresh_model, tiny_tokenizer

from lirefs import Direction, wrap

needs_lm_eval = pytest.mark.skipif(
    importlib.util.find_spec("lm_eval") is None,
    reason="lm_eval is not installed: pip install 'lm-eval>=0.4.13'",
)

MULTIPLE_CHOICE = """
task: fruits
dataset_path: json
dataset_kwargs: {{data_files: {{train: {data}, test: {data}}}}}
training_split: train
test_split: test
output_type: multiple_choice
doc_to_text: "Q: {{{{question}}}}\\nA:"
doc_to_choice: "{{{{options}}}}"
doc_to_target: answer
num_fewshot: {shots}
metric_list: [{{metric: acc}}, {{metric: acc_norm}}]
"""
GENERATION = """
task: words
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: generate_until
doc_to_text: "Say {{{{question}}}}:"
doc_to_target: "{{{{options[answer]}}}}"
generation_kwargs: {{until: {until}, max_gen_toks: 12}}
metric_list: [{{metric: exact_match, aggregation: mean, higher_is_better: true}}]
filter_list:
  - {{name: first, filter: [{{function: take_first}}]}}
  - name: letter
    filter: [{{function: regex, regex_pattern: "([A-Z])"}}, {{function: take_first}}]
"""
FRUITS = ["apple", "fig", "plum", "orange", "pear"]


def rows(count=11):
    return [
        {
            "question": f"{FRUITS[i % 5]} " * (1 + i % 3) + str(i),
            "options": [FRUITS[i % 5], FRUITS[(i + 1) % 5], "an " + FRUITS[(i + 2) % 5]],
            "answer": i % 3,
        }
        for i in range(count)
    ]


def write_tasks(folder: Path) -> None:
    """Write two tasks with local data."""
    data = folder / "rows.jsonl"
    data.write_text("\n".join(map(json.dumps, rows())))
    (folder / "fruits.yaml").write_text(MULTIPLE_CHOICE.format(data=data, shots=2))
    until = json.dumps([character * 2 for character in "ab"] + ["e", "Q"])
    (folder / "words.yaml").write_text(GENERATION.format(data=data, until=until))


def language_model(family="llama", bos=True):
    model = fresh_model(family, **({"max_position_embeddings": 256} if family == "llama" else {}))
    return wrap(model, tiny_tokenizer(bos=bos))


def hflm(lm, batch_size=3):
    from lm_eval.models.huggingface import HFLM

    return HFLM(pretrained=lm.model, tokenizer=lm.tokenizer, batch_size=batch_size)


def evaluated(model, folder, task, **settings):
    import lm_eval
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=str(folder))
    return lm_eval.simple_evaluate(
        model, tasks=[task], task_manager=manager, bootstrap_iters=0, **settings
    )


def direction():
    return Direction(torch.randn(32, generator=torch.Generator().manual_seed(0)), 1)
