"""Recitation: a model continues texts, greedily; the tasks that ask for it, and their scores."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from lirefs.errors import TaskError, as_list, must_be, whole_number
from lirefs.model.batching import checked_ids, position_limit, token_ids, token_ids_and_spans
from lirefs.model.guest import maybe_call
from lirefs.model.language_model import LanguageModel
from lirefs.tasks.batches.recomputed import Advance, progress_in_items
from lirefs.tasks.inference import greedy
from lirefs.tasks.items import ItemTask, common_prefix
from lirefs.tasks.task import ItemResult
from lirefs.tasks.texts import TextRow, Texts, text_rows

_log = logging.getLogger(__name__)
SUFFIX_TOKENS = 12
LOOSE = 0.75


@dataclass(frozen=True, repr=False)
class _Memorized(ItemTask):
    """Base of the tasks here: items of a prefix and the suffix that followed it in training."""

    items: Sequence[Any]
    group: str = "memorization"
    metric: str = "strict"
    chance: float = 0.0

    columns = ("id", "prefix_ids", "suffix_ids")
    generates = True

    def _checked(self, where: str, *values: Any) -> Iterable[Any]:
        for name, ids in zip(self.columns[1:], values, strict=True):
            as_list(ids, f"{where}: {name}", error=TaskError)
            if not len(ids):
                raise TaskError(f"{where} has an empty prefix or suffix")
            for one in ids:
                whole_number(one, f"{where}: an id of {name}", least=0, error=TaskError)
        return values

    def encoded(self, lm: LanguageModel) -> None:
        """Check the ids and the length of each item."""
        for name, *values in self.items:
            for column, ids in zip(self.columns[1:], values, strict=True):
                checked_ids(lm.model, ids, f"{self.name}: item {name!r}: {column}", TaskError)
        self._fit_positions(lm, (len(one[1]) + len(one[2]) - 1 for one in self.items))


@dataclass(frozen=True, repr=False)
class Recitation(_Memorized):
    """Greedy continuation of a prefix, compared with its suffix in training.

    Attributes:
        items: (id, prefix ids, suffix ids), scored by `recitation_scores`.

    Raises:
        TaskError: No item, or one has an empty prefix or suffix.
    """

    def run(self, lm: LanguageModel, advance: Advance) -> list[ItemResult]:
        """Score every item."""
        self.encoded(lm)
        outputs = _continued(lm, [item[1:] for item in self.items], advance)
        results = []
        for (item, prefix, suffix), output in zip(self.items, outputs, strict=True):
            texts = map(lm.tokenizer.decode, (prefix, suffix, output))
            scores = recitation_scores(output, suffix)
            if not output:  # the model overflowed
                scores = dict.fromkeys(scores, math.nan)
            results.append(ItemResult(item, scores, 1.0, *texts))
        return results


def recitation_task(
    lm: LanguageModel,
    texts: Texts,
    limit: int | None = None,
    name: str = "passages",
    *,
    suffix_tokens: int = SUFFIX_TOKENS,
) -> Recitation:
    """A recitation task of your own texts: does the model continue them word for word?

    Args:
        lm: The model; its tokenizer cuts texts into prefix and suffix.
        texts: Texts, or a path: a list of strings, of (id, text) or of rows, a file of JSON Lines,
            a file of text (one item, however many lines it has), or a folder of `.txt` files. A row
            has `prefix_ids` and `suffix_ids`, as `mine` writes them, or `prefix` and `suffix`
            texts, or one `text`. Texts are cut between
            two tokens of the whole text: at the first that begins in the `suffix`, or, if a row has
            `suffix_tokens`, that many before the end. With ids, `tokenizer` may be the fingerprint
            of their tokenizer.
        limit: At most this many items.
        name: Name of the task.
        suffix_tokens: Tokens to recite of a `text` whose row does not say how many.

    Raises:
        DataFileError: A file cannot be read.
        TaskError: A row has none of these fields, is too short, or has ids of another tokenizer.
    """
    must_be(lm, LanguageModel, "lm", TaskError)
    whole_number(suffix_tokens, "suffix_tokens", least=1, error=TaskError)
    rows = text_rows(texts, "texts")[:limit]
    return recitation_of_rows(lm, rows, name, suffix_tokens)


def recitation_of_rows(
    lm: LanguageModel, rows: Sequence[TextRow], name: str, suffix_tokens: int = SUFFIX_TOKENS
) -> Recitation:
    """A recitation task of rows that were read; see `recitation_task`."""
    items = []
    for row in rows:
        try:
            prefix, suffix = _cut(lm, row.fields, suffix_tokens)
            if not prefix or not suffix:
                raise TaskError("too short for a prefix and a suffix")
        except TaskError as problem:
            raise TaskError(f"{row.where}: {problem}") from None
        items.append((row.id, prefix, suffix))
        _warn_of_many_lines(lm, row, len(prefix) + len(suffix))
    return Recitation(name, items)


def _warn_of_many_lines(lm: LanguageModel, row: TextRow, tokens: int) -> None:
    """Warn of a text that is too long for the model because it is a file of many."""
    limit = position_limit(lm.model)
    if limit is not None and tokens > limit and "\n" in str(row.fields.get("text", "")).strip():
        _log.warning(
            "%s is one item of %d tokens, and the model reads %d: a file of text is one item; if "
            "each of its lines is a text, give JSON Lines or a list of strings",
            row.where,
            tokens,
            limit,
        )


def suffix_start(tokenizer: Any, text: str, cut: int) -> tuple[list[int], int]:
    """Token ids of a text, and the index of the first that begins after `cut` characters or later.

    A token begins at its first character that is not a space, so that " word" begins a suffix
    whether its space is before the cut or after it; a token that the cut divides is in the prefix.
    TaskError: the tokenizer is slow and does not decode to the text, so the beginnings are unknown.
    """
    if tokenizer.is_fast:
        ((ids, spans),) = token_ids_and_spans(tokenizer, [text])
        ends = [0, *(end for _, end in spans)]
        # Byte-level tokenizers leave spaces out of their spans, which may then be empty.
        begins = [min(start, end) for (start, _), end in zip(spans, ends[:-1], strict=True)]
    else:
        (ids,) = token_ids(tokenizer, [text])
        # A character of several tokens is decoded as U+FFFD until its last one is there.
        exact = {"skip_special_tokens": True, "clean_up_tokenization_spaces": False}
        heads = [tokenizer.decode(ids[:end], **exact) for end in range(len(ids) + 1)]
        if heads[-1] != text:
            raise TaskError(
                "the tokenizer does not decode a text to itself, so the text cannot be cut; give "
                "`prefix_ids` and `suffix_ids`, or `suffix_tokens`"
            )
        ends = [len(head.rstrip("\ufffd")) for head in heads]
        begins = ends[:-1]
    for index, (begin, end) in enumerate(zip(begins, ends[1:], strict=True)):
        piece = text[begin:end]
        spaces = len(piece) - len(piece.lstrip()) if piece.strip() else 0
        if begin + spaces >= cut:
            return ids, index
    return ids, len(ids)


def _cut(
    lm: LanguageModel, row: Mapping[str, Any], suffix_tokens: int
) -> tuple[list[int], list[int]]:
    if "prefix_ids" in row and "suffix_ids" in row:
        if row.get("tokenizer", lm.tokenizer_fingerprint) != lm.tokenizer_fingerprint:
            raise TaskError(f"its ids belong to another tokenizer than that of {lm.name}")
        return _ids(lm, row["prefix_ids"]), _ids(lm, row["suffix_ids"])
    keys = ("prefix", "suffix") if "prefix" in row and "suffix" in row else ("text",)
    parts: list[Any] = [row.get(key) for key in keys]
    if not all(isinstance(part, str) for part in parts):
        raise TaskError("needs 'text', or 'prefix' and 'suffix', or their ids")
    whole = "".join(parts)
    length = row.get("suffix_tokens", suffix_tokens if len(parts) == 1 else None)
    if length is None:
        ids, start = suffix_start(lm.tokenizer, whole, len(parts[0]))
        return ids[:start], ids[start:]
    if type(length) is not int or length < 1:
        raise TaskError(f"'suffix_tokens' is {length!r}; expected a positive integer")
    ids = lm.encode([whole])[0]
    return ids[:-length], ids[-length:]


def _ids(lm: LanguageModel, ids: Any) -> list[int]:
    known = getattr(maybe_call(lm.model, "get_input_embeddings"), "num_embeddings", None)
    if not isinstance(ids, list) or not all(type(one) is int and one >= 0 for one in ids):
        raise TaskError("'prefix_ids' and 'suffix_ids' must be lists of token ids")
    if known is not None and any(one >= known for one in ids):
        raise TaskError(
            f"token id {max(ids)} is outside the {known} tokens of {lm.name}; use the model that "
            "the ids were mined with"
        )
    return ids


@dataclass(frozen=True, repr=False)
class StressTest(_Memorized):
    """Position stress test: how much of a suffix is still recited from shifted prompts.

    Greedy continuations of longer prompts, which include up to `shifts` tokens of the suffix, and
    of shorter ones, which lack up to `shifts` tokens at their beginning (Huang et al. 2024;
    Merullo et al. 2025, table 6). The score of a prompt is the number of leading tokens of its
    continuation that agree with the rest of the suffix. Scores of an item, in tokens: `original`,
    that of the prefix itself, and `perturbed`, the highest over all prompts.

    Attributes:
        items: (id, prefix ids, suffix ids). A leading beginning-of-sequence token stays in place
            in every prompt and does not count.
        shifts: The paper's t. Shorter prompts keep more than this many tokens.

    Raises:
        TaskError: No item, one has an empty prefix or suffix, or `shifts` is negative.
    """

    metric: str = "perturbed"
    shifts: int = 20

    def __post_init__(self) -> None:
        super().__post_init__()
        whole_number(self.shifts, f"{self.name}: shifts", least=0, error=TaskError)

    def prompts(
        self, prefix: Sequence[int], suffix: Sequence[int], bos: int | None = None
    ) -> list[tuple[list[int], list[int]]]:
        """Token ids of each prompt and of the rest of the suffix; first the prefix itself."""
        lead = [bos] if prefix[0] == bos else []
        body = list(prefix[len(lead) :])
        longer = [
            ([*prefix, *suffix[:shift]], list(suffix[shift:]))
            for shift in range(min(self.shifts, len(suffix) - 1) + 1)
        ]
        most = min(self.shifts, len(body) - self.shifts - 1)
        return longer + [([*lead, *body[n:]], list(suffix)) for n in range(1, most + 1)]

    def run(self, lm: LanguageModel, advance: Advance) -> list[ItemResult]:
        """Score every item."""
        self.encoded(lm)
        bos = lm.tokenizer.bos_token_id
        asked = [self.prompts(prefix, suffix, bos) for _, prefix, suffix in self.items]
        flat = [prompt for prompts in asked for prompt in prompts]
        outputs = iter(_continued(lm, flat, progress_in_items(advance, len(self.items), len(flat))))
        results = []
        for (item, _, _), prompts in zip(self.items, asked, strict=True):
            said = [(*prompt, next(outputs)) for prompt in prompts]
            agreed = [common_prefix(output, rest) for _, rest, output in said]
            scores = {"original": float(agreed[0]), "perturbed": float(max(agreed))}
            if not all(output for _, _, output in said):  # the model overflowed
                scores = dict.fromkeys(scores, math.nan)
            texts = map(lm.tokenizer.decode, said[agreed.index(max(agreed))])
            results.append(ItemResult(item, scores, 1.0, *texts))
        return results


def _continued(
    lm: LanguageModel, prompts: Sequence[tuple[Sequence[int], Sequence[int]]], advance: Advance
) -> list[list[int]]:
    """Greedy continuation of each prompt, as long as the text to be recited after it."""
    starts, rests = [start for start, _ in prompts], [rest for _, rest in prompts]
    return greedy(lm, starts, list(map(len, rests)), drafts=rests, advance=advance)


def recitation_scores(output: Sequence[int], suffix: Sequence[int]) -> dict[str, float]:
    """Scores of one continuation against the true one.

    For a suffix of L tokens and a token edit distance d (Merullo et al. 2025, section 5): `strict`
    is d = 0, `loose` is 1 - d/L >= 0.75, `levenshtein` is d/L. `token_match` is the share of the L
    positions that hold the right token: unlike d, it counts a shift by one as all wrong. Both
    arguments are token ids; the suffix has at least one.

    Raises:
        TaskError: An argument is not a list of whole numbers, or the suffix is empty.
    """
    output, suffix = (
        [
            whole_number(one, f"an id of the {name}", error=TaskError)
            for one in as_list(ids, f"the {name}", error=TaskError)
        ]
        for name, ids in (("output", output), ("suffix", suffix))
    )
    if not suffix:
        raise TaskError("the suffix has no token")
    distance = edit_distance(output, suffix) / len(suffix)
    right = sum(one == other for one, other in zip(output, suffix, strict=False))
    return {
        "strict": float(distance == 0),
        "loose": float(1 - distance >= LOOSE),
        "levenshtein": distance,
        "token_match": right / len(suffix),
    }


def levenshtein(first: Sequence[Any], second: Sequence[Any]) -> int:
    """Edit distance between two sequences (insert, delete, replace, each 1).

    Raises:
        TaskError: One of them is not a sequence.
    """
    both = [one.tolist() if isinstance(one, Tensor) else one for one in (first, second)]
    for name, one in zip(("first", "second"), both, strict=True):
        must_be(one, Sequence, name, TaskError)
    return edit_distance(*both)


def edit_distance(first: Sequence[Any], second: Sequence[Any]) -> int:
    """The same of two sequences that are known to be some; `lm_eval_export` copies its source."""
    row = list(range(len(second) + 1))
    for i, one in enumerate(first, start=1):
        previous, row[0] = row[0], i
        for j, other in enumerate(second, start=1):
            previous, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, previous + (one != other))
    return row[-1]
