"""Which tokens of a prompt are read and steered, and how strongly, to look at."""

from __future__ import annotations

import html
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from torch import Tensor

from lirefs.directions.direction import places_text
from lirefs.directions.prompts import prompts_of, token_text
from lirefs.errors import must_be, whole_number
from lirefs.model.batching import check_length
from lirefs.model.guest import evaluating
from lirefs.model.interrupts import note, undone
from lirefs.model.intervention import Intervention, UndoStack, attach_to, compose
from lirefs.model.language_model import LanguageModel
from lirefs.model.layout import Layout
from lirefs.model.prompts import prompt_lengths
from lirefs.questions import Question
from lirefs.steering.steer import Steer
from lirefs.steering.token_mask import TokenMask

_WIDTH, _LINES = 88, 12
_GAP = "..."
_HTML_TOKENS = 400
"""More tokens would make a cell slow; those in the middle are left out."""


@dataclass(frozen=True)
class ShownTokens:
    """The tokens of a text, the one that is read, and how strongly each is steered.

    Printed as text of at most 12 lines, and drawn in colour by notebooks.

    Attributes:
        tokens: The text of each token.
        read: Index of the last token of the prompt, whose states are read and predict the answer.
        strengths: For each steering and each strength of its places, how strongly each token is
            steered: one number a token, 0 where it is not steered. Named by operator and place.
    """

    tokens: tuple[str, ...]
    read: int
    strengths: dict[str, tuple[float, ...]]

    @property
    def strongest(self) -> tuple[float, ...]:
        """For each token the strength of largest size among all steerings."""
        rows = list(self.strengths.values()) or [(0.0,) * len(self.tokens)]
        return tuple(max(column, key=abs) for column in zip(*rows, strict=True))

    def __str__(self) -> str:
        varying = len({one for one in self.strongest if one}) > 1
        marked = []
        for index, (token, strength) in enumerate(zip(self.tokens, self.strongest, strict=True)):
            text = _visible(token)
            if strength:
                text = f"[{text} {strength:.2g}]" if varying else f"[{text}]"
            marked.append(f">{text}<" if index == self.read else text)
        head = [_shortened(line) for line in self._head()]
        if len(head) > _LINES // 2:
            more = len(head) - _LINES // 2 + 1
            head[_LINES // 2 - 1 :] = [f"and {more} more"]
        return "\n".join([*head, *_wrapped(marked, _LINES - len(head))])

    __repr__ = __str__

    def _head(self) -> Iterator[str]:
        read = f">token {self.read}< is read: {self.tokens[self.read]!r}"
        yield f"{len(self.tokens)} tokens; {read}"
        for name, row in self.strengths.items():
            touched = [one for one in row if one]
            if not touched:
                yield f"{name}: no token is steered"
                continue
            low, high = min(touched), max(touched)
            size = f"{low:.3g}" if low == high else f"{low:.3g} to {high:.3g}"
            yield f"{name}: [{len(touched)} of {len(row)} tokens], strength {size}"

    def _repr_html_(self) -> str:
        most = max(map(abs, self.strongest)) or 1.0
        kept = range(len(self.tokens))
        half = _HTML_TOKENS // 2
        shown = [*kept] if len(kept) <= _HTML_TOKENS else [*kept[:half], None, *kept[-half:]]
        spans = []
        for index in shown:
            if index is None:
                spans.append(f"<span> {_GAP} </span>")
                continue
            strength = self.strongest[index]
            colour = "0,114,178" if strength > 0 else "213,94,0"  # blue and orange
            share = 0.15 + 0.45 * abs(strength) / most if strength else 0
            style = f"background:rgba({colour},{share:.2f});border-radius:3px;padding:1px 2px;"
            if index == self.read:
                style += "outline:2px solid currentColor;"
            about = [f"token {index}"] + ["is read"] * (index == self.read)
            about += [f"{name}: {row[index]:.3g}" for name, row in self.strengths.items()]
            title = html.escape("; ".join(about))
            text = html.escape(_visible(self.tokens[index]))
            spans.append(f'<span style="{style}" title="{title}">{text}</span>')
        head = "<br>".join(html.escape(line) for line in self._head())
        body = "<wbr>".join(spans)
        return f'<div>{head}</div><div style="font-family:monospace;line-height:1.9">{body}</div>'


def show_tokens(
    lm: LanguageModel,
    prompt: str | Question,
    steer: Intervention | None = None,
    *,
    max_new_tokens: int = 0,
) -> ShownTokens:
    """Show which token of a prompt is read, and which are steered and how strongly.

    The steering is attached and tells what it does in one forward pass: scopes, schedules, gates
    and strengths are those that act.

        lirefs.show_tokens(lm, lm.chat("Is it safe?"), steer, max_new_tokens=8)

    Args:
        lm: The model.
        prompt: A text, or a question, with the prompt that `fit` reads.
        steer: A steering, or a composition of steerings and weight edits; None for the token that
            is read alone.
        max_new_tokens: How many tokens to generate under it first, which are shown as well.

    Raises:
        SettingError: The prompt is empty or too long, or is not a text or a question.
        InterventionError: `steer` is not an intervention, or does not fit the model.
        ScopeError: The scope does not fit the prompt.
    """
    must_be(lm, LanguageModel, "lm")
    must_be(prompt, (str, Question), "prompt")
    whole_number(max_new_tokens, "max_new_tokens", least=0)
    parts = () if steer is None else compose(steer).members
    text = prompt if isinstance(prompt, str) else prompts_of(lm, [prompt])[0]
    (ids,) = lm.encode([text])
    length = len(ids)
    check_length(lm.model, length, "the prompt")
    steers = [one for one in parts if isinstance(one, Steer)]
    # All before the first is attached: after a weight edit the model would look like another.
    layouts = {one: one.check(lm.model) for one in steers}
    masks = {one: one.token_mask() for one in steers}
    undo = UndoStack()
    with undone() as steps:
        steps.append(undo.remove)
        for part in parts:
            if isinstance(part, Steer):
                part.attach_checked(lm.model, layouts[part], undo, masks[part])
            else:
                note(undo.steps, attach_to, lm.model, part)
        if max_new_tokens:
            out = lm.generate(text, max_new_tokens, return_dict_in_generate=True)
            ids = out.sequences[0].tolist()
        batch = lm.pad([ids])
        with evaluating(lm.model), prompt_lengths(length):
            lm.model(**batch, use_cache=False)
        strengths = {}
        for number, one in enumerate(steers, 1):
            prefix = f"{number}. " if len(steers) > 1 else ""
            for name, row in _rows(one, layouts[one], masks[one]):
                strengths[prefix + name] = tuple(row.tolist())
    return ShownTokens(tuple(token_text(lm, one) for one in ids), length - 1, strengths)


def _rows(steer: Steer, layout: Layout, mask: TokenMask) -> Iterator[tuple[str, Tensor]]:
    """Name and strengths by token, (tokens,), of the places that have a strength in common."""
    by_strength: dict[float, list[tuple[int, str]]] = {}
    for layer, site, _ in steer.operators(layout):
        number = steer.strength[layer] if isinstance(steer.strength, dict) else steer.strength
        number = number if isinstance(number, float) else 1.0  # tokens or rows bring their own
        by_strength.setdefault(number, []).append((layer, site))
    for number, places in (by_strength or {0.0: []}).items():
        name = f"{steer.operator}, {places_text(places)}, scope {steer.scope.name}"
        yield name + ", gated" * (steer.gate is not None), mask.strengths(number)[0]


def _visible(token: str) -> str:
    """A token with its spaces and line ends drawn."""
    drawn = token.replace(" ", "·").replace("\n", "↵").replace("\t", "→")
    return "".join(one if one.isprintable() else ascii(one)[1:-1] for one in drawn) or "''"


def _shortened(text: str) -> str:
    return text if len(text) <= _WIDTH else f"{text[: _WIDTH - len(_GAP)]}{_GAP}"


def _wrapped(words: Sequence[str], most: int) -> list[str]:
    """Words in at most so many lines; if there are more, those in the middle are left out."""
    rows: list[list[str]] = [[]]
    for word in words:
        short = _shortened(word)
        if rows[-1] and sum(map(len, rows[-1])) + len(rows[-1]) + len(short) > _WIDTH:
            rows.append([])
        rows[-1].append(short)
    if len(rows) > most:
        begin, end = most // 2, len(rows) - (most - most // 2 - 1)
        hidden = sum(map(len, rows[begin:end]))
        rows[begin:end] = [[f"{_GAP} {hidden} tokens {_GAP}"]]
    return [" ".join(row) for row in rows]
