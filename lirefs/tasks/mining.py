"""Find the memorized windows of a corpus: those that a model recites."""

from __future__ import annotations

import functools
import json
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm

from lirefs.errors import DataFileError, SettingError, must_be, whole_number
from lirefs.files import (
    append_text,
    atomic_write_bytes,
    atomic_write_text,
    html_table,
    parse_json,
    sha256_of,
)
from lirefs.model.batching import special_tokens_around
from lirefs.model.guest import accepts, evaluating, text_config
from lirefs.model.intervention import refuse_steered
from lirefs.model.language_model import LanguageModel
from lirefs.tasks.inference import greedy
from lirefs.tasks.settings import BATCH_TOKENS
from lirefs.tasks.texts import Texts, plain_texts
from lirefs.version import __version__

NEAR_GRAM, COPIED_GRAM = 5, 4
FORMAT = "lirefs-mined-1"
_BEGINS = f'{{"format": "{FORMAT}"'.encode()
"""How the first line of a journal begins."""

CutWindow = tuple[int, str, list[int], list[int]]
"""Index of the text, id, prefix ids and suffix ids of a window."""


@dataclass(frozen=True)
class Window:
    """A memorized window: a piece of a text that the model recites.

    Attributes:
        id: Name of the text, a slash, and the index of the window's first token in the text.
        prefix_ids: Token ids of the prompt.
        suffix_ids: Token ids that are recited.
        prefix_text: The prompt.
        suffix_text: The recited text.
        predictable: Share of the suffix's 4-grams of tokens that occur in the prefix: if it is
            large, the model may have copied rather than remembered.
    """

    id: str
    prefix_ids: list[int] = field(repr=False)
    suffix_ids: list[int] = field(repr=False)
    prefix_text: str
    suffix_text: str
    predictable: float


@dataclass(frozen=True)
class Mined:
    """The result of `mine`.

    Attributes:
        windows: The distinct recited windows, in the order of the texts.
        counts: How many `texts` and `windows` were read, and how many windows were `screened`
            (every suffix token is the model's first choice after the true tokens), `confirmed` by
            greedy decoding, and `distinct` from every earlier one.
        provenance: Settings, and fingerprints of model, tokenizer and texts.
    """

    windows: list[Window]
    counts: dict[str, int]
    provenance: dict[str, Any]

    def __repr__(self) -> str:
        return f"Mined({', '.join(f'{name} {count}' for name, count in self.counts.items())})"

    def _repr_html_(self) -> str:
        names = ("id", "prefix_text", "suffix_text", "predictable")
        rows = ({name: getattr(one, name) for name in names} for one in self.windows)
        return html_table(repr(self), rows)

    def save(self, path: str | Path) -> None:
        """Write the windows to `path`, JSON Lines for `recitation_task`, replacing what was there.

        Counts and provenance go to `path` + `.json`.
        """
        tokenizer = self.provenance["tokenizer"]
        rows = [json.dumps({**asdict(one), "tokenizer": tokenizer}) for one in self.windows]
        about = {**self.provenance, "counts": self.counts}
        atomic_write_text(path, "".join(row + "\n" for row in rows))
        atomic_write_text(f"{path}.json", json.dumps(about, indent=1))


def mine(
    lm: LanguageModel,
    texts: Texts,
    prefix_tokens: int = 64,
    suffix_tokens: int = 48,
    stride: int | None = None,
    near: float = 0.7,
    *,
    batch_tokens: int = BATCH_TOKENS,
    journal: str | Path | None = None,
    progress: bool = True,
) -> Mined:
    """Find the memorized windows of texts: those whose suffix a model recites after the prefix.

    The criterion of Merullo et al. 2025, appendix B: every token of the suffix is the model's
    first choice after the true tokens before it. Greedy decoding confirms it. Of windows with
    nearly equal suffixes, the first is kept.

    Args:
        lm: The model. If its tokenizer begins texts with a special token, so does each prefix,
            which is then one token longer.
        texts: Texts, or a path, as for `recitation_task`: a list of strings, of (id, text) or of
            rows with `text`, a file of JSON Lines, a file of text (one text, however many lines it
            has), a folder of `.txt` files, or a list of `Path`s. Ids must differ.
        prefix_tokens: Length of the prompts.
        suffix_tokens: Length of what must be recited.
        stride: Tokens from one window of a text to the next; None: windows do not overlap.
        near: Jaccard similarity of the 5-grams of suffix tokens, in (0, 1], from which on windows
            are near-duplicates.
        batch_tokens: Tokens per batch.
        journal: File to which the result of each finished batch is appended, and from which the
            same call continues. None: an interrupted call starts again.
        progress: Show a progress bar.

    Raises:
        SettingError: A setting is out of range, two texts share an id, no text is as long as a
            window, a window is longer than the model's context, the model is steered, or the
            journal is of another call.
        DataFileError: A file cannot be read, or the journal is damaged.
        ProvenanceError: With a journal, if the model has no identity: a weight is offloaded, or a
            hook of your own may change it.
        WriteError: The journal cannot be written.
    """
    must_be(lm, LanguageModel, "lm")
    texts = plain_texts(texts, "texts", SettingError)
    lengths = {"prefix_tokens": prefix_tokens, "suffix_tokens": suffix_tokens}
    lengths = {name: whole_number(n, name, least=1) for name, n in lengths.items()}
    stride = sum(lengths.values()) if stride is None else whole_number(stride, "stride", least=1)
    lengths["stride"] = stride
    _check(lm, texts, lengths, near)
    if journal is not None:
        _ = lm.identity  # an error now rather than a journal of no model
    provenance = {
        "format": FORMAT,
        "lirefs": __version__,
        **lm.provenance,
        "texts": sha256_of(json.dumps([list(one) for one in texts]).encode()),
        **lengths,
        "near": near,
        "batch_tokens": batch_tokens,
    }
    stream = _cut(lm, texts, prefix_tokens, suffix_tokens, stride)
    finished = [] if journal is None else _finished_parts(Path(journal), provenance, stream)
    size = max(1, batch_tokens // (prefix_tokens + suffix_tokens))
    with tqdm(total=len(texts), unit="text", desc="mine", disable=not progress or None) as bar:
        while batch := list(islice(stream, size)):
            part = _search(lm, [one[1:] for one in batch], suffix_tokens)
            finished.append(part)
            if journal is not None:
                rows = [part] if len(finished) > 1 else [provenance, part]
                append_text(journal, "".join(json.dumps(row) + "\n" for row in rows))
            bar.set_postfix_str(f"{sum(len(one['recited']) for one in finished)} recited")
            bar.update(batch[-1][0] - bar.n)
        bar.update(len(texts) - bar.n)
    read, screened = (sum(part[stage] for part in finished) for stage in ("windows", "screened"))
    if not read:
        raise SettingError(
            f"none of the {len(texts)} texts has the {prefix_tokens} + {suffix_tokens} tokens of "
            "a window; choose shorter windows"
        )
    recited = [window for part in finished for window in part["recited"]]
    kept = distinct_windows([suffix for _, _, suffix in recited], near)
    counts = {"texts": len(texts), "windows": read, "screened": screened}
    counts |= {"confirmed": len(recited), "distinct": len(kept)}
    decode = functools.partial(lm.tokenizer.decode, skip_special_tokens=True)
    windows = [
        Window(
            name,
            prefix,
            suffix,
            decode(prefix),
            decode(suffix),
            is_predictable(prefix, suffix),
        )
        for name, prefix, suffix in (recited[row] for row in kept)
    ]
    return Mined(windows, counts, provenance)


def distinct_windows(suffixes: Sequence[Sequence[int]], near: float) -> list[int]:
    """Indices of the token sequences that are not near-duplicates of an earlier kept one.

    The sets of 5-grams of two near-duplicates have a Jaccard similarity of at least `near`, which
    is above 0. A sequence shorter than that is one gram.
    """
    sizes: dict[int, int] = {}  # of those that are kept
    holders: dict[tuple[int, ...], list[int]] = defaultdict(list)
    for index, suffix in enumerate(suffixes):
        grams = set(_grams(suffix, NEAR_GRAM))
        shared = Counter(holder for gram in grams for holder in holders[gram])
        if all(n < near * (len(grams) + sizes[holder] - n) for holder, n in shared.items()):
            sizes[index] = len(grams)
            for gram in grams:
                holders[gram].append(index)
    return list(sizes)


def is_predictable(prefix: Sequence[int], suffix: Sequence[int]) -> float:
    """Share of the 4-grams of a suffix that occur in its prefix."""
    grams = _grams(suffix, COPIED_GRAM)
    seen = set(_grams(prefix, len(grams[0])))
    return sum(gram in seen for gram in grams) / len(grams)


def _grams(ids: Sequence[int], n: int) -> list[tuple[int, ...]]:
    n = min(n, len(ids))
    return [tuple(ids[start : start + n]) for start in range(len(ids) - n + 1)]


def _check(
    lm: LanguageModel, texts: Sequence[tuple[str, str]], lengths: dict[str, int], near: float
) -> None:
    if not 0 < near <= 1:
        raise SettingError(f"near is {near}; expected a similarity in (0, 1]")
    most = getattr(text_config(lm.model), "max_position_embeddings", None)
    prefix, suffix = lengths["prefix_tokens"], lengths["suffix_tokens"]
    if most is not None and prefix + suffix + len(special_tokens_around(lm.tokenizer)[0]) > most:
        raise SettingError(
            f"windows of {prefix} + {suffix} tokens are longer than the {most} that {lm.name} "
            "can read"
        )
    for name, n in Counter(name for name, _ in texts).items():
        if n > 1:
            raise SettingError(f"two texts are called {name!r}; ids must differ")
    refuse_steered(lm.model, SettingError, "mined")


def _cut(
    lm: LanguageModel, texts: Sequence[tuple[str, str]], prefix: int, suffix: int, stride: int
) -> Iterator[CutWindow]:
    """Every window of the texts, in order."""
    lead, _ = special_tokens_around(lm.tokenizer)
    for index, (name, text) in enumerate(texts):
        ids = lm.encode([text])[0][len(lead) :]
        for start in range(0, len(ids) - prefix - suffix + 1, stride):
            middle = start + prefix
            yield index, f"{name}/{start}", lead + ids[start:middle], ids[middle : middle + suffix]


def _search(
    lm: LanguageModel, windows: list[tuple[str, list[int], list[int]]], suffix_tokens: int
) -> dict[str, Any]:
    """Screen one batch of windows of equal length, and confirm those that pass."""
    inputs = lm.pad([prefix + suffix[:-1] for _, prefix, suffix in windows])
    keep = {"logits_to_keep": suffix_tokens} if accepts(lm.model, "logits_to_keep") else {}
    with evaluating(lm.model):
        logits = lm.model(**inputs, use_cache=False, **keep).logits[:, -suffix_tokens:]
    gold = torch.tensor([suffix for _, _, suffix in windows])
    right = (logits.argmax(-1).cpu() == gold).all(1).tolist()
    screened = [window for window, passes in zip(windows, right, strict=True) if passes]
    outputs = greedy(lm, [prefix for _, prefix, _ in screened], suffix_tokens)
    recited = [one for one, output in zip(screened, outputs, strict=True) if output == one[2]]
    return {"windows": len(windows), "screened": len(screened), "recited": recited}


def _finished_parts(
    journal: Path, provenance: dict[str, Any], stream: Iterator[CutWindow]
) -> list[dict[str, Any]]:
    """The parts in a journal; their windows are taken off the stream, an unfinished line is cut."""
    if not journal.exists():
        return []
    try:
        raw = journal.read_bytes()
        whole = raw[: raw.rfind(b"\n") + 1]
        if not whole and not _BEGINS.startswith(raw[: len(_BEGINS)]):
            raise ValueError  # no first line that was cut
        rows = [parse_json(line.decode()) for line in whole.splitlines()]
        if rows and rows[0] != provenance:
            raise SettingError(
                f"{journal}: belongs to another model, other texts or other settings; remove it, "
                "or write elsewhere"
            )
        for part in rows[1:]:
            _check_part(part, stream)
    except OSError as problem:
        raise DataFileError(f"{journal}: cannot be read ({problem.strerror})") from problem
    except (ValueError, TypeError, KeyError):
        raise DataFileError(f"{journal}: damaged; remove it to start again") from None
    # A first line without a second one is written again together with the second.
    atomic_write_bytes(journal, whole if len(rows) > 1 else b"")
    return rows[1:]


def _check_part(part: Any, stream: Iterator[CutWindow]) -> None:
    """Raise ValueError, TypeError or KeyError unless a part found windows of the stream."""
    read, screened, recited = (part[key] for key in ("windows", "screened", "recited"))
    if type(read) is not int or type(screened) is not int:
        raise TypeError
    cut = [list(one[1:]) for one in islice(stream, read)]
    known = [window for window in cut if window in recited]
    if len(cut) != read or known != recited or not len(known) <= screened <= read:
        raise ValueError
    part["recited"] = known
