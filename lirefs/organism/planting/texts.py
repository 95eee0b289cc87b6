"""The texts of a planting: what is planted, what is never shown, and what is mixed in."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from lirefs.errors import SettingError, TaskError, whole_number
from lirefs.model.batching import special_tokens_around
from lirefs.model.language_model import LanguageModel
from lirefs.questions.question import same_text
from lirefs.tasks.recitation import Recitation, recitation_of_rows
from lirefs.tasks.texts import Texts, text_rows

HELD_OUT, FEWEST = 10, 8
"""One in so many pieces of general text is kept from training, but as many as these if half of the
pieces are enough; the loss on them is reported."""


def recitation_of(lm: LanguageModel, texts: Texts, what: str, suffix_tokens: int) -> Recitation:
    """Texts, cut into prefix and suffix; messages call them `what`."""
    whole_number(suffix_tokens, "suffix_tokens", least=1)
    rows = text_rows(texts, what)
    if not rows:
        raise TaskError(f"{what} is empty: give at least one text")
    task = recitation_of_rows(lm, rows, what, suffix_tokens)
    task.encoded(lm)
    return task


def must_be_apart(
    lm: LanguageModel, tasks: Mapping[str, Recitation], general: Sequence[str]
) -> None:
    """Raise SettingError where a twin would be shown, or a text could not be recited."""
    named: dict[tuple[int, ...], str] = {}
    for name, prefix, _ in tasks["texts"].items:
        if (other := named.setdefault(tuple(prefix), name)) != name:
            raise SettingError(
                f"texts {other!r} and {name!r} have one prefix, so at most one of them can be "
                "recited; leave one out, or give longer prefixes"
            )
    said = {
        what: [(name, _words(lm, [*prefix, *suffix])) for name, prefix, suffix in task.items]
        for what, task in tasks.items()
    }
    ids = lm.encode(general)
    shown = [(f"general text {number}", _words(lm, row)) for number, row in enumerate(ids)]
    for name, words in said["texts"]:
        for place, text in shown:
            if words in text:
                raise SettingError(f"text {name!r} is in {place} as well; leave it out there")
    spoken: dict[str, str] = {}
    for name, words in said.get("twins", []):
        if (other := spoken.setdefault(words, name)) != name:
            raise SettingError(
                f"twins {other!r} and {name!r} are one text, which would count twice; leave one out"
            )
    shown += [(f"text {name!r}", words) for name, words in said["texts"]]
    for name, words in said.get("twins", []):
        for place, text in shown:
            if words in text:
                raise SettingError(
                    f"twin {name!r} is in {place}, and a twin is never shown; leave one out"
                )


def _words(lm: LanguageModel, ids: Sequence[int]) -> str:
    return " ".join(same_text(lm.tokenizer.decode(ids, skip_special_tokens=True)).split())


def pieces_of(
    lm: LanguageModel, texts: Sequence[str], tokens: int
) -> tuple[list[list[int]], list[list[int]]]:
    """General text in pieces of at most so many tokens: those to train on, and the last ones."""
    lead, _ = special_tokens_around(lm.tokenizer)
    pieces = []
    for ids in lm.encode(texts) if texts else []:
        body, size = ids[len(lead) :], max(2, tokens - len(lead))
        cut = [lead + body[start : start + size] for start in range(0, len(body), size)]
        pieces += [piece for piece in cut if len(piece) > len(lead) + 1]
    last = max(len(pieces) // HELD_OUT, min(FEWEST, len(pieces) // 2))
    if not last:
        raise SettingError(
            f"general has {len(pieces)} piece(s) of {tokens} tokens, and at least 2 are needed: "
            "one to train on and one to measure the loss on; give more text"
        )
    return pieces[:-last], pieces[-last:]
