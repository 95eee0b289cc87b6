"""Whether every way of running a model gives what one row alone gives, for one family.

The reference is a plain forward pass of one row, without mask, positions or cache, with hooks of
its own. A cell is "equal", the named refusal, or the size of a silent difference. Run as a script,
this writes the page `docs/families.md`:

    PYTHONPATH=.:tests/support python tests/support/family_table.py
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from families import FAMILIES, LEFT_OUT, family_lm
from torch import Tensor

import lirefs
from lirefs.errors import LirefsError
from lirefs.steering import scope
from lirefs.tasks.inference import greedy, score_continuations, token_nlls

TOLERANCE = 1e-5
SHARED = list(range(40, 50))
RESTS = [[61, 7, 33], [90, 11, 52, 76, 101, 14, 23, 64, 88], [35, 71, 99, 18, 44]]
OPTIONS = [[55, 60], [81], [30, 97, 66]]
NEW = 5
STEERED = 1
SCOPES = {
    "all": "all",
    "prompt": "prompt",
    "generated": "generated",
    "last prompt token": "last_prompt_token",
    "from position 3": scope.from_position(3),
}
Cell = str
EQUAL = "equal"


def check_family(name: str) -> dict[str, Cell]:
    """Every cell of the table for one family."""
    try:
        lm = family_lm(name)
    except LirefsError as problem:
        return {"load": _refusal(problem)}
    apart = [[20 + 9 * n, *SHARED[n:], *rest] for n, rest in enumerate(RESTS)]
    together = [[*SHARED, *rest] for rest in RESTS]
    checks: dict[str, Callable[[], float]] = {
        "capture left": lambda: _capture(lm, apart, "left"),
        "capture right": lambda: _capture(lm, apart, "right"),
        "capture alone": lambda: _capture(lm, apart[:1], "left"),
        "texts": lambda: _texts(lm, apart),
        "options alone": lambda: max(_options(lm, [prompt]) for prompt in apart),
        "options": lambda: _options(lm, apart),
        "options, shared": lambda: _options(lm, together),
        "greedy alone": lambda: max(_greedy(lm, [prompt]) for prompt in apart),
        "greedy": lambda: _greedy(lm, apart),
        "greedy, shared": lambda: _greedy(lm, together),
        "generate": lambda: _generate(lm, apart),
    }
    for said, one in SCOPES.items():
        steer = lirefs.Steer(_direction(lm), "add", 1.0, scope=one)
        checks[f"scope {said}"] = lambda steer=steer: _scope(lm, steer, apart)  # type: ignore[misc]
        checks[f"scope {said}, generate"] = lambda steer=steer: _scoped(lm, steer, apart)  # type: ignore[misc]
    found: dict[str, Cell] = {}
    for cell, check in checks.items():
        try:
            error = check()
            found[cell] = EQUAL if error <= TOLERANCE else f"DIFFERS by {error:.2g}"
        except LirefsError as problem:
            found[cell] = _refusal(problem)
        except Exception as problem:
            found[cell] = f"RAISES {type(problem).__name__}: {problem!s:.150}"
    unused = [said for name, said in _WAYS.items() if getattr(lm.traits, name) is False]
    found["not used"] = ", ".join(unused)
    return found


_WAYS = {
    "causal": "likelihoods",
    "left": "padding left",
    "right": "padding right",
    "positions": "positions",
    "cache": "cache",
    "continued": "continued cache",
    "shared": "shared beginning",
}


def _refusal(problem: LirefsError) -> Cell:
    return f"refused: {type(problem).__name__}: {problem}"


def is_silent(cell: Cell) -> bool:
    """Whether a cell is neither equal nor a named refusal."""
    return cell.startswith(("DIFFERS", "RAISES"))


def _logits(lm: Any, ids: Sequence[int], touched: Callable[[int], bool] | None = None) -> Tensor:
    """Logits of one row alone, (tokens, vocabulary), the direction added where `touched` says."""
    hooks = []
    if touched is not None:
        marks = torch.tensor([float(touched(index)) for index in range(len(ids))])[None, :, None]

        def add(module: Any, args: Any, kwargs: Any) -> Any:
            if args:
                return (args[0] + marks * _direction(lm).vector, *args[1:]), kwargs
            hidden = kwargs["hidden_states"] + marks * _direction(lm).vector
            return args, {**kwargs, "hidden_states": hidden}

        block = lm.layout.block(lm.model, STEERED)
        hooks.append(block.register_forward_pre_hook(add, with_kwargs=True))
    try:
        with torch.no_grad():
            return lm.model(input_ids=torch.tensor([list(ids)]), use_cache=False).logits[0]
    finally:
        for hook in hooks:
            hook.remove()


def _direction(lm: Any) -> lirefs.Direction:
    generator = torch.Generator().manual_seed(3)
    return lirefs.Direction(3 * torch.randn(lm.width, generator=generator), STEERED)


def _off(found: Any, expected: Any) -> float:
    found, expected = torch.as_tensor(found).double(), torch.as_tensor(expected).double()
    assert expected.isfinite().all()
    return float((found - expected).abs().max() / expected.abs().max().clamp(min=1.0))


def _capture(lm: Any, rows: list[list[int]], side: str) -> float:
    layers = list(range(lm.n_layers))
    found = lirefs.capture(
        lm, rows, positions=[0, 4, -3, -1], padding_side=side, sites=["resid_pre"], progress=False
    ).values
    seen: dict[int, Tensor] = {}
    worst = 0.0
    for index, ids in enumerate(rows):
        hooks = []
        for layer in layers:

            def keep(module: Any, args: Any, kwargs: Any, layer: int = layer) -> None:
                seen[layer] = (args[0] if args else kwargs["hidden_states"]).clone()

            block = lm.layout.block(lm.model, layer)
            hooks.append(block.register_forward_pre_hook(keep, with_kwargs=True))
        _logits(lm, ids)
        for hook in hooks:
            hook.remove()
        for layer in layers:
            worst = max(worst, _off(found[index, layer], seen[layer][0, [0, 4, -3, -1]]))
    return worst


def _texts(lm: Any, rows: list[list[int]]) -> float:
    found = token_nlls(lm, rows)
    worst = 0.0
    for ids, nll in zip(rows, found, strict=True):
        likely = _logits(lm, ids).float().log_softmax(-1)
        expected = -likely[:-1].gather(1, torch.tensor(ids[1:])[:, None])[:, 0]
        worst = max(worst, _off(nll, expected))
    return worst


def _options(lm: Any, prompts: list[list[int]]) -> float:
    found = score_continuations(lm, [(prompt, OPTIONS) for prompt in prompts])
    worst = 0.0
    for prompt, scores in zip(prompts, found, strict=True):
        for option, (value, _) in zip(OPTIONS, scores, strict=True):
            likely = _logits(lm, [*prompt, *option]).float().log_softmax(-1)
            steps = range(len(prompt) - 1, len(prompt) + len(option) - 1)
            expected = sum(
                float(likely[at, token]) for at, token in zip(steps, option, strict=True)
            )
            worst = max(worst, _off(value, expected))
    return worst


def _continued(
    lm: Any, prompt: list[int], steer: Any = None, ends: Sequence[int] = ()
) -> list[int]:
    """Greedy tokens by one plain pass of the whole row for each."""
    row = list(prompt)
    for _ in range(NEW):
        logits = _logits(lm, row, None if steer is None else _touched(steer, len(prompt)))
        row.append(int(logits[-1].argmax()))
        if row[-1] in ends:
            break
    return row[len(prompt) :]


def _touched(steer: lirefs.Steer, prompt: int) -> Callable[[int], bool]:
    return {
        "all": lambda index: True,
        "prompt": lambda index: index < prompt,
        "generated": lambda index: index >= prompt,
        "last_prompt_token": lambda index: index == prompt - 1,
        "from_position": lambda index: index >= 3,
    }[steer.scope.name]


def _differing(found: list[list[int]], expected: list[list[int]]) -> float:
    return float(sum(one != other for one, other in zip(found, expected, strict=True)))


def _greedy(lm: Any, prompts: list[list[int]], steer: Any = None) -> float:
    found = greedy(lm, prompts, NEW)
    return _differing(found, [_continued(lm, prompt, steer) for prompt in prompts])


def _text_of(lm: Any, ids: list[int]) -> str:
    return str(lm.tokenizer.decode(lm.before_end(ids), skip_special_tokens=True))


def _generate(lm: Any, prompts: list[list[int]], steer: Any = None) -> float:
    texts = [lm.tokenizer.decode(prompt) for prompt in prompts]
    found = lm.generate(texts, max_new_tokens=NEW)
    expected = [_text_of(lm, _continued(lm, ids, steer, lm.end_tokens)) for ids in lm.encode(texts)]
    return float(sum(one != other for one, other in zip(found, expected, strict=True)))


def _scope(lm: Any, steer: lirefs.Steer, prompts: list[list[int]]) -> float:
    expected = [_continued(lm, prompt, steer) for prompt in prompts]
    with steer.apply(lm.model):
        found = greedy(lm, prompts, NEW)
        alone = [greedy(lm, [prompt], NEW)[0] for prompt in prompts]
    return _differing(found + alone, expected + expected)


def _scoped(lm: Any, steer: lirefs.Steer, prompts: list[list[int]]) -> float:
    texts = [lm.tokenizer.decode(prompt) for prompt in prompts]
    expected = [_text_of(lm, _continued(lm, ids, steer, lm.end_tokens)) for ids in lm.encode(texts)]
    with steer.apply(lm.model):
        found = lm.generate(texts, max_new_tokens=NEW)
        alone = [lm.generate(text, max_new_tokens=NEW) for text in texts]
    return float(
        sum(one != other for one, other in zip(found + alone, expected + expected, strict=True))
    )


PAGE = Path(__file__).parents[2] / "docs" / "families.md"
COLUMNS = {
    "capture": ("capture left", "capture right", "capture alone"),
    "texts": ("texts",),
    "options": ("options alone", "options", "options, shared"),
    "greedy": ("greedy alone", "greedy", "greedy, shared"),
    "generate": ("generate",),
    "scopes": tuple(f"scope {one}{tail}" for one in SCOPES for tail in ("", ", generate")),
}
_INTRODUCTION = """# Families

Every family below was built from a small configuration with random weights, and run in every way
that this library runs a model. Each cell was compared with a plain forward pass of one row alone,
without mask, positions or cache: capture with padding on the left, on the right and alone; the
likelihood of texts; options and greedy decoding, alone, in a batch, and after a beginning that all
prompts share; `lm.generate`; and scopes of steering (all, prompt, generated, last prompt token,
from a position) in the harness and in `lm.generate`. Prompts are longer than windows and chunks.

* **equal**: the same numbers up to 1e-5, and the same tokens.
* **refused**: a named error before any work; the reasons are listed below the table.

*Not used* lists what the model does not honour, found by the forward passes of `lm.traits`: other
ways take its place, which may be slower. This page is written by
`tests/support/family_table.py`, and tests marked `slow` compare every row with a new run.

| family | kind | capture | texts | options | greedy | generate | scopes | not used |
|---|---|---|---|---|---|---|---|---|
"""


def row(name: str, cells: Mapping[str, Cell]) -> str:
    """The row of the page for one family."""
    columns = []
    for parts in COLUMNS.values():
        found = {cells.get(part, cells.get("load", EQUAL)).split(":")[0] for part in parts}
        columns.append(EQUAL if found == {EQUAL} else ", ".join(sorted(found - {EQUAL})))
    unused = cells.get("not used", "")
    return f"| {name} | {FAMILIES[name].kind} | {' | '.join(columns)} | {unused} |"


def reasons(name: str, cells: Mapping[str, Cell]) -> list[str]:
    """The reasons of the refusals of one family, each once."""
    found = dict.fromkeys(one for one in cells.values() if one.startswith("refused"))
    return [f"* **{name}**: {one.removeprefix('refused: ').splitlines()[0]}" for one in found]


def page() -> str:
    """The whole page, from a new run of every family."""
    rows, said = [], []
    for name in FAMILIES:
        cells = check_family(name)
        rows.append(row(name, cells))
        said += reasons(name, cells)
        sys.stderr.write(f"{rows[-1]}\n")
    left_out = [f"* **{name}**: {why}" for name, why in sorted(LEFT_OUT.items())]
    parts = [_INTRODUCTION + "\n".join(rows)]
    parts += ["## Refused, and why", "\n".join(said) or "None."]
    parts += ["## Left out, and why", "\n".join(left_out)]
    return "\n\n".join(parts) + "\n"


if __name__ == "__main__":
    PAGE.write_text(page(), "utf-8")
