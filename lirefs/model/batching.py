"""Texts as token ids, lengths that a model can read, and batches of similar length."""

from __future__ import annotations

import hashlib
import json
import logging
import math
import operator
import weakref
from collections.abc import Sequence
from typing import Any

from torch import nn

from lirefs.errors import LirefsError, SettingError, as_list, first_line_of_error
from lirefs.files import HALF
from lirefs.model.guest import maybe_call, text_config

_log = logging.getLogger(__name__)
_WARNED: weakref.WeakSet[nn.Module] = weakref.WeakSet()

# For each tokenizer the unknown words that a warning has named.
_UNKNOWN_WORDS: weakref.WeakKeyDictionary[Any, set[str]] = weakref.WeakKeyDictionary()
_UNKNOWN = 0.01
"""Share of unknown tokens from which on a warning names them."""

# For each tokenizer its hash, and what would have changed with it.
_TOKENIZERS: weakref.WeakKeyDictionary[Any, tuple[Any, str]] = weakref.WeakKeyDictionary()
_RULES = ("normalizer", "pre_tokenizer", "post_processor")

Span = tuple[int, int]
"""First character of a token, and one past its last."""


def special_tokens_around(tokenizer: Any) -> tuple[list[int], list[int]]:
    """The ids that a tokenizer adds before and after every text."""
    for text in ("a", "0", "."):  # some vocabularies lack letters
        whole, alone = (
            list(tokenizer(text, add_special_tokens=added)["input_ids"]) for added in (True, False)
        )
        for start in range(len(whole) - len(alone) + 1) if alone else ():
            if whole[start : start + len(alone)] == alone:
                return whole[:start], whole[start + len(alone) :]
    return [], []


def token_ids(
    tokenizer: Any, texts: Sequence[str], add_special_tokens: bool = True
) -> list[list[int]]:
    """The token ids of each text, as every part of this library reads it.

    A text ends with its own last token: what the tokenizer appends (`add_eos_token`) is left out,
    since a prompt is read and continued at its end. A text that begins with the special token of
    the beginning, as a chat template writes it, does not get a second one.
    """
    return [ids for ids, _ in _encoded(tokenizer, texts, add_special_tokens, spans=False)]


def token_ids_and_spans(
    tokenizer: Any, texts: Sequence[str], add_special_tokens: bool = True
) -> list[tuple[list[int], list[Span]]]:
    """The same with the characters of each token; only fast tokenizers know them."""
    return _encoded(tokenizer, texts, add_special_tokens, spans=True)


def _encoded(
    tokenizer: Any, texts: Sequence[str], add_special_tokens: bool, spans: bool
) -> list[tuple[list[int], list[Span]]]:
    extra = {"return_offsets_mapping": True} if spans else {}
    settings = {"add_special_tokens": add_special_tokens, "padding": False, **extra}
    try:
        encoded = tokenizer(list(texts), **settings)
    except BaseException as problem:
        if not _of_tokenizer(problem):
            raise
        raise _encode_error(tokenizer, texts, problem) from problem
    before, after = special_tokens_around(tokenizer) if add_special_tokens else ([], [])
    _warn_of_unknown_words(tokenizer, texts, encoded["input_ids"], len(before) + len(after))
    found = []
    for row, ids in enumerate(encoded["input_ids"]):
        written = ids[len(before) : 2 * len(before)] == before  # by the text itself
        kept = slice(len(before) * written, len(ids) - len(after))
        found.append(
            ([int(one) for one in ids[kept]], encoded["offset_mapping"][row][kept] if spans else [])
        )
    return found


def _of_tokenizer(problem: BaseException) -> bool:
    """Whether an error is one of a tokenizer; where `tokenizers` panics, it is not an Exception."""
    return isinstance(problem, Exception) or type(problem).__name__ == "PanicException"


def _encode_error(tokenizer: Any, texts: Sequence[str], problem: BaseException) -> SettingError:
    """The error that names the first text that a tokenizer cannot read."""
    for index, text in enumerate(texts):
        if half := HALF.search(text):
            return SettingError(
                f"prompt {index} has half of a character (\\u{ord(half[0]):04x}) at "
                f"{half.start()}: it was decoded or cut wrongly; read it again, or leave that out"
            )
        try:
            tokenizer([text])
        except BaseException as alone:
            if not _of_tokenizer(alone):
                raise
            problem = alone
            break
    else:
        index = 0
    reason = first_line_of_error(problem) or type(problem).__name__
    return SettingError(f"the tokenizer cannot read prompt {index}: {reason}")


def checked_ids(
    model: nn.Module, ids: Any, what: str, error: type[LirefsError] = SettingError
) -> list[int]:
    """Token ids as whole numbers; `error` unless there are some, and the model knows them all."""
    try:
        row = [operator.index(one) for one in as_list(ids, what, error=error)]
    except TypeError:
        raise error(f"{what} must hold token ids, which are whole numbers") from None
    if not row:
        raise error(f"{what} has no token")
    known = getattr(maybe_call(model, "get_input_embeddings"), "num_embeddings", math.inf)
    if not 0 <= min(row) <= max(row) < known:
        raise error(
            f"{what} has token {max(row) if min(row) >= 0 else min(row)}, and the model knows 0 to "
            f"{known - 1}: is the tokenizer another model's?"
        )
    return row


def _warn_of_unknown_words(
    tokenizer: Any, texts: Sequence[str], ids: Sequence[Sequence[int]], added: int
) -> None:
    """Warn of texts whose words a tokenizer does not know, once for each first such word.

    `added` is the number of special tokens that it adds to each.
    """
    unknown = getattr(tokenizer, "unk_token_id", None)
    used_otherwise = ("bos_token_id", "eos_token_id", "pad_token_id")
    if unknown is None or unknown in [getattr(tokenizer, name, None) for name in used_otherwise]:
        return  # byte-level tokenizers know every word, and name another token here
    times = [row.count(unknown) for row in ids]
    share = sum(times) / max(1, sum(len(row) - added for row in ids))
    if share < _UNKNOWN:
        return
    text = next(one for one, n in zip(texts, times, strict=True) if n)
    word = next((one for one in text.split() if unknown in tokenizer(one)["input_ids"]), text[:20])
    named = _UNKNOWN_WORDS.setdefault(tokenizer, set())
    if word == tokenizer.unk_token or word in named:
        return  # a text that holds the token itself, as one that was decoded does
    named.add(word)
    _log.warning(
        "the tokenizer does not know %.0f %% of the tokens of these texts, first %r: the model "
        "reads %s in their place; is this the model's language?",
        100 * share,
        word,
        tokenizer.unk_token,
    )


def tokenizer_hash(tokenizer: Any) -> str:
    """Return the SHA-256 of everything that decides the token ids of a text.

    The vocabulary is read again when its length, special tokens, rules or template have changed.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    special = {name: str(token) for name, token in tokenizer.special_tokens_map.items()}
    template = getattr(tokenizer, "chat_template", None)
    rules = [getattr(backend, name, None) for name in _RULES]
    small = (len(tokenizer), str(special), str(template), *(one.__getstate__() for one in rules))
    known = _TOKENIZERS.get(tokenizer)
    if known is None or known[0] != small:
        whole = json.loads(backend.to_str()) if backend is not None else {}
        for state in ("padding", "truncation"):  # left behind by the last call
            whole.pop(state, None)
        vocabulary = sorted(tokenizer.get_vocab().items())
        text = json.dumps([vocabulary, whole, special, template], sort_keys=True, default=str)
        known = _TOKENIZERS[tokenizer] = (small, hashlib.sha256(text.encode()).hexdigest())
    return known[1]


def position_limit(model: nn.Module) -> int | None:
    """The number of positions in a model's configuration, None if it names none."""
    limit = getattr(text_config(model), "max_position_embeddings", None)
    return limit if isinstance(limit, int) and limit > 0 else None


def check_length(
    model: nn.Module, tokens: int, what: str, error: type[LirefsError] = SettingError
) -> None:
    """Raise `error` if a model has no embeddings for the positions of so many tokens.

    A model whose positions are computed (rotary ones, ALiBi) runs beyond the length in its
    configuration, more or less well: a warning says so, once.
    """
    limit = position_limit(model)
    if limit is None or tokens <= limit:
        return
    if _embeds_positions(model, limit):
        raise error(
            f"{what} needs {tokens} positions, and the model has {limit}: shorten the text, or "
            "generate fewer tokens"
        )
    if rope_limit(model, "dynamic") is not None:
        raise error(
            f"{what} needs {tokens} positions: beyond {limit}, dynamic rotary positions depend on "
            "which texts the model has read before; shorten the text, or set another rope_type"
        )
    if model not in _WARNED:
        _WARNED.add(model)
        _log.warning(
            "%s needs %d positions, more than the %d that the model's configuration names; its "
            "predictions may be poor there",
            what,
            tokens,
            limit,
        )


def rope_limit(model: nn.Module, kind: str) -> int | None:
    """Tokens up to which rotary positions of a kind do not depend on the longest row of a batch."""
    config = text_config(model)
    scaling = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None)
    parts = [scaling, *scaling.values()] if isinstance(scaling, dict) else []
    for part in parts:  # of the model, or of each type of layer
        if isinstance(part, dict) and part.get("rope_type", part.get("type")) == kind:
            original = "original_max_position_embeddings"
            limit = part.get(original) or getattr(config, original, None)
            return int(limit or position_limit(model) or 0)
    return None


def _embeds_positions(model: nn.Module, limit: int) -> bool:
    """Whether a table of a model has a row for each position, or two more as in OPT and BART."""
    words = maybe_call(model, "get_input_embeddings")
    known = {id(one) for one in words.parameters()} if isinstance(words, nn.Module) else set()
    tables = [*model.named_parameters(), *model.named_buffers()]
    return any(
        ("pos" in name or "wpe" in name)
        and not name.endswith("bias")
        and table.dim() == 2
        and limit <= len(table) <= limit + 2
        and id(table) not in known
        for name, table in tables
    )


def batches_by_tokens(
    lengths: Sequence[int], budget: int, enough: int | None = None
) -> list[list[int]]:
    """Item indices by padded batch of at most `budget` tokens (a longer item gets its own batch).

    The longest come first, so that a batch too large for memory fails at once. In a batch with
    `enough` tokens, an item shorter than 3/4 of its longest starts the next one.
    """
    batches: list[list[int]] = []
    size = width = 0
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        wasteful = enough is not None and size >= enough and 4 * lengths[index] < 3 * width
        if not batches or size + width > budget or wasteful:
            batches.append([])
            size, width = 0, max(lengths[index], 1)
        batches[-1].append(index)
        size += width
    return batches


def equal_batches(lengths: Sequence[int], budget: int) -> list[list[int]]:
    """Item indices by batch of at most `budget` tokens, all of one length; the longest first."""
    by_length: dict[int, list[int]] = {}
    for index, length in enumerate(lengths):
        by_length.setdefault(length, []).append(index)
    return [
        [rows[index] for index in batch]
        for length, rows in sorted(by_length.items(), reverse=True)
        for batch in batches_by_tokens([length] * len(rows), budget)
    ]
