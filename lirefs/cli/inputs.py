"""UndoStack that commands share: batches, factors, sentences, figures."""

from __future__ import annotations

from pathlib import Path

import kfac
import lirefs
from lirefs.errors import SettingError
from lirefs.files import read_jsonl


def load_with_factors(
    model: str, device: str | None, factors: Path
) -> tuple[lirefs.LanguageModel, kfac.Factors]:
    """Read the factors before the model, which takes longer, and check that they fit."""
    known = kfac.Factors.load(factors)
    lm = lirefs.load(model, device=device)
    known.check(lm.model)
    return lm, known


def texts_of(path: Path) -> list[str]:
    """Texts of a JSON Lines file, each row with a `text`."""
    rows = read_jsonl(path)
    for line, row in rows:
        if not isinstance(row.get("text"), str) or not row["text"]:
            raise SettingError(f"{path}, line {line}: needs a `text` that is not empty")
    return [str(row["text"]) for _, row in rows]
