"""Rows of the parity table for llama.cpp: a control vector and baked weights against the hooks.

`.ci/llama FOLDER` installs the server; `LIREFS_LLAMA_CPP=FOLDER` says where it is.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests" / "support"))

from llama_server import Answer, answer_of, converted, llama_server  # noqa: E402

import lirefs  # noqa: E402
from lirefs.export import bake, to_gguf  # noqa: E402
from lirefs.steering.steer import Steer  # noqa: E402

Row = dict[str, Any]


def llama_rows(lm: lirefs.LanguageModel, prompts: list[str], steers: dict[str, Steer]) -> list[Row]:
    """One row for each steering by `add`, as a control vector in llama-server.

    Args:
        lm: The model, on the CPU in float32.
        prompts: Texts, in turn the prompt of each question.
        steers: Steerings that `to_gguf` can write, by what the table calls them.
    """
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        model = converted(lm, Path(folder))
        for what, steer in steers.items():
            vector = Path(folder) / "c.gguf"
            to_gguf(steer, vector, lm)
            pairs = _pairs(lm, prompts, steer, model, "--control-vector", vector)
            rows.append(_row("llama.cpp control vector", lm, what, pairs))
    return rows


def baked_rows(lm: lirefs.LanguageModel, prompts: list[str], steers: dict[str, Steer]) -> list[Row]:
    """Two rows for each steering that `bake` can write: transformers, and llama-server."""
    rows = []
    for what, steer in steers.items():
        baked = bake(steer, lm.model)
        twin = lirefs.wrap(baked, lm.tokenizer, name=lm.name)
        ids = lm.encode(prompts)
        pairs = [(answer_of(twin, one), answer_of(lm, one, steer)) for one in ids]
        rows.append(_row("baked weights, transformers", lm, what, pairs))
        with tempfile.TemporaryDirectory() as folder:
            pairs = _pairs(lm, prompts, steer, converted(lm, Path(folder), baked))
            rows.append(_row("baked weights, llama.cpp", lm, what, pairs))
    return rows


def _pairs(
    lm: lirefs.LanguageModel, prompts: list[str], steer: Steer, model: Path, *given: str | Path
) -> list[tuple[Answer, Answer]]:
    """What a server and the hooks answer to each prompt."""
    with llama_server(model, *given) as client:
        vocabulary = lm.model.config.vocab_size
        return [
            (client.ask(ids, vocabulary), answer_of(lm, ids, steer)) for ids in lm.encode(prompts)
        ]


def _row(
    runtime: str, lm: lirefs.LanguageModel, what: str, pairs: list[tuple[Answer, Answer]]
) -> Row:
    differences = [(one.logprobs - other.logprobs).abs().max() for one, other in pairs]
    return {
        "runtime": runtime,
        "model": lm.name,
        "what": what,
        "max_difference": float(max(differences)),
        "greedy_equal": all(one.tokens == other.tokens for one, other in pairs),
    }
