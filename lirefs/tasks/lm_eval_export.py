"""Write recitation items as a task folder of lm-evaluation-harness."""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lirefs.errors import TaskError, got, must_be
from lirefs.files import atomic_write_text, refuse_foreign
from lirefs.model.batching import token_ids
from lirefs.tasks.recitation import Recitation, edit_distance
from lirefs.tasks.shipped_data import DATA

YAML, UTILS = DATA / "lm_eval_task.yaml.template", DATA / "lm_eval_utils.py.template"


def write_lm_eval_task(
    folder: str | Path,
    name: str,
    items: Sequence[tuple[str, Sequence[int], Sequence[int]]],
    tokenizer: Any,
) -> int:
    """Write recitation items as a task that lm-eval runs, with the scores of `Recitation`.

    The folder then holds `NAME.yaml`, `NAME.jsonl`, `NAME_utils.py` and `NAME_tokenizer/`, and
    `lm_eval --include_path FOLDER --tasks NAME` needs nothing else. lm-eval passes on text, not
    tokens, so an item is written only if its text has the same tokens again. (The distance of an
    output may differ for the same reason; one that recites its suffix always counts.)

    Args:
        folder: Created if missing; an earlier task of this name in it is replaced.
        name: Name of the task: letters, digits and underscores.
        items: (id, prefix ids, suffix ids), as in `Recitation`.
        tokenizer: The tokenizer of these ids.

    Returns:
        How many items were left out because their text has other tokens.

    Raises:
        TaskError: The name has other characters, or no item is left.
        SettingError: The folder holds files of these names that are not those of a task.
    """
    must_be(name, str, "name", TaskError)
    if not callable(tokenizer):
        raise TaskError(f"tokenizer must be a tokenizer, got {got(tokenizer)}")
    if not re.fullmatch(r"[A-Za-z]\w*", name, re.ASCII):
        raise TaskError(f"{name!r} cannot name a task: use letters, digits and underscores")
    items = Recitation(name, items).items
    rows = []
    for item, prefix, suffix in items:
        if (largest := max(*prefix, *suffix)) >= len(tokenizer):
            raise TaskError(f"{name}: item {item!r}: the tokenizer has no token {largest}")
        whole = tokenizer.decode([*prefix, *suffix], skip_special_tokens=True)
        text = tokenizer.decode(list(prefix), skip_special_tokens=True)
        same = token_ids(tokenizer, [text, whole]) == [list(prefix), [*prefix, *suffix]]
        if same and whole.startswith(text):
            ids = {"prefix_ids": list(prefix), "suffix_ids": list(suffix)}
            rows.append({"id": item, "prefix": text, "suffix": whole[len(text) :], **ids})
    if not rows:
        raise TaskError(f"{name}: none of {len(items)} items has a text with the same tokens")
    folder = Path(folder)
    others = (f"{name}.jsonl", f"{name}_utils.py", f"{name}_tokenizer")
    refuse_foreign(folder / f"{name}.yaml", f"!function {name}_utils.load", others)
    tokenizer.save_pretrained(folder / f"{name}_tokenizer")
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
    atomic_write_text(folder / f"{name}.jsonl", "".join(lines))
    utils = UTILS.read_text("utf-8").format(
        name=name, edit_distance=inspect.getsource(edit_distance)
    )
    atomic_write_text(folder / f"{name}_utils.py", utils)
    tokens = max(len(row["suffix_ids"]) for row in rows)
    yaml = YAML.read_text("utf-8").format(name=name, tokens=tokens)
    atomic_write_text(folder / f"{name}.yaml", yaml)
    return len(items) - len(rows)
