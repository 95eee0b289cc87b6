"""One direction on every runtime: do they compute what the hooks compute?

    python benchmarks/parity.py [--vllm PYTHON] [--llama FOLDER] [--model NAME] [--write]

For each runtime, model and steering: the largest difference of the log-probabilities of all tokens
of the vocabulary, at every step of a greedy continuation of prompts of different lengths, from
those under the hooks; and whether the text is equal. `--vllm` names the Python of an environment
with vLLM, as `.ci/vllm` makes it, which runs this file for its rows; `--llama` the folder of a
llama-server, as `.ci/llama` makes it. `--write` puts the table into docs/how-to/serve.md. Takes
five minutes on two cores.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import lirefs
from lirefs.directions.direction import Direction
from lirefs.errors import LirefsError
from lirefs.model.intervention import applied
from lirefs.tasks import greedy

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests" / "support"))

from llama_server import VARIABLE, converted, llama_server  # noqa: E402

PAGE = ROOT / "docs/how-to/serve.md"
BEGIN, END = "<!-- parity: made by benchmarks/parity.py -->", "<!-- end of parity -->"
MODELS = ("organism", "smollm2-135m")
PROMPTS = [
    "Math: 31 + 27 =",
    "Note: Dan Reed lives in Paris. Ada Tate lives with Dan Reed. Question: Where does Dan Reed "
    "live? Answer:",
    "Logic: not true is",
]
NEW_TOKENS = 6


@dataclass
class Run:
    """Greedy continuations, and the log-probabilities at each step, (tokens, vocabulary)."""

    tokens: list[list[int]]
    logprobs: list[Tensor]

    def difference(self, other: Run) -> float:
        """Largest difference, up to where the texts part."""
        gaps = [0.0]
        for mine, theirs, one, two in zip(
            self.tokens, other.tokens, self.logprobs, other.logprobs, strict=True
        ):
            pairs = list(zip(mine, theirs, strict=True))
            equal = next((at for at, (a, b) in enumerate(pairs) if a != b), len(pairs) - 1)
            width = min(one.shape[1], two.shape[1])
            gaps.append(float((one - two)[: equal + 1, :width].abs().max()))
        return max(gaps)


def steerings(lm: Any) -> dict[str, lirefs.Steer]:
    """What is compared: every operator, site and scope once or more, at half the depth."""
    layer = lm.n_layers // 2
    vector = torch.randn(lm.width, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        out = lm.model(**lm.pad(lm.encode(PROMPTS[:1])), output_hidden_states=True)
    vector *= float(out.hidden_states[layer][0, -1].norm()) / vector.norm() / 2

    def at(site: str, operator: str, strength: float = 1.0, **settings: Any) -> lirefs.Steer:
        return lirefs.Steer(Direction(vector, layer, site), operator, strength, **settings)

    return {
        "add, all": at("resid_pre", "add"),
        "ablate, all layers and sites": at(
            "resid_pre", "ablate", layers="all", sites=["resid_pre", "attn_out", "resid_post"]
        ),
        "amplify, all": at("resid_post", "amplify", 2.0),
        "clamp attn_out, all": at("attn_out", "clamp", float(vector.norm())),
        "add to mlp_out, all": at("mlp_out", "add"),
        "add, prompt": at("resid_pre", "add", scope="prompt"),
        "clamp, generated": at("resid_post", "clamp", float(vector.norm()), scope="generated"),
        "add, last prompt token": at("resid_pre", "add", scope="last_prompt_token"),
    }


def hooks(lm: Any, steer: lirefs.Steer | None) -> Run:
    """The reference: hooks in `transformers`."""
    ids = lm.encode(PROMPTS)
    with applied(steer, lm.model), torch.no_grad():
        tokens = greedy(lm, ids, NEW_TOKENS)
        logprobs = []
        for prompt, new in zip(ids, tokens, strict=True):
            with lirefs.prompt_lengths(len(prompt)):
                logits = lm.model(torch.tensor([prompt + new]), use_cache=False).logits
            logprobs.append(logits[0, len(prompt) - 1 : -1].log_softmax(-1))
    return Run(tokens, logprobs)


def _step_by_step(lm: Any, logits_of: Callable[[Tensor], Tensor]) -> Run:
    """Greedy decoding by whole forward passes."""
    run = Run([], [])
    for prompt in lm.encode(PROMPTS):
        ids, rows = list(prompt), []
        for _ in range(NEW_TOKENS):
            rows.append(logits_of(torch.tensor([ids]))[0, -1].log_softmax(-1))
            ids.append(int(rows[-1].argmax()))
        run.tokens.append(ids[len(prompt) :])
        run.logprobs.append(torch.stack(rows))
    return run


def transformer_lens() -> Callable[[Any], Callable[[lirefs.Steer], Run]]:
    """TransformerLens, booted on a copy of the model."""
    from lirefs.export import transformer_lens as lens

    def on(lm: Any) -> Callable[[lirefs.Steer], Run]:
        bridge = lens.boot(lm)

        def run(steer: lirefs.Steer) -> Run:
            placed = lens.hooks(steer, bridge, lm)
            with torch.no_grad():
                return _step_by_step(lm, lambda ids: bridge.run_with_hooks(ids, fwd_hooks=placed))

        return run

    return on


def nnsight() -> Callable[[Any], Callable[[lirefs.Steer], Run]]:
    """Traces of nnsight."""
    from lirefs.export import nnsight as sight

    def on(lm: Any) -> Callable[[lirefs.Steer], Run]:
        model = sight.wrap(lm)
        return lambda steer: _step_by_step(lm, lambda ids: sight.logits(model, lm, ids, steer))

    return on


def vllm() -> Callable[[Any], Callable[[lirefs.Steer], Run]]:
    """An engine of vLLM on a saved copy; prompts in one batch and in chunks."""
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    from vllm import LLM

    from lirefs.export import vllm as ours

    def on(lm: Any) -> Callable[[lirefs.Steer], Run]:
        folder = save(lm, Path(tempfile.mkdtemp()))
        llm = LLM(
            str(folder),
            dtype="float32",
            max_model_len=128,
            max_num_batched_tokens=16,
            max_num_seqs=8,
            max_logprobs=-1,
            enable_prefix_caching=False,
            **ours.OPTIONS,
        )

        def run(steer: lirefs.Steer) -> Run:
            with ours.steered(llm, steer):
                return generated_by(llm, lm)

        return run

    return on


def control_vector() -> Callable[[Any], Callable[[lirefs.Steer], Run]]:
    """llama-server with a control vector, on an F32 file of the model."""

    def on(lm: Any) -> Callable[[lirefs.Steer], Run]:
        folder = Path(tempfile.mkdtemp())
        model = converted(lm, folder)

        def run(steer: lirefs.Steer) -> Run:
            lirefs.export.to_gguf(steer, folder / "c.gguf", lm)
            return _asked(lm, model, "--control-vector", folder / "c.gguf")

        return run

    return on


def baked() -> Callable[[Any], Callable[[lirefs.Steer], Run]]:
    """The steering in the weights, in transformers."""

    def on(lm: Any) -> Callable[[lirefs.Steer], Run]:
        def run(steer: lirefs.Steer) -> Run:
            return hooks(lirefs.wrap(lirefs.bake(steer, lm.model), lm.tokenizer), None)

        return run

    return on


def baked_llama() -> Callable[[Any], Callable[[lirefs.Steer], Run]]:
    """The steering in the weights, in llama-server on an F32 file."""

    def on(lm: Any) -> Callable[[lirefs.Steer], Run]:
        def run(steer: lirefs.Steer) -> Run:
            model = lirefs.bake(steer, lm.model)
            with tempfile.TemporaryDirectory() as folder:
                return _asked(lm, converted(lm, Path(folder), model))

        return run

    return on


def _asked(lm: Any, model: Path, *arguments: str | Path) -> Run:
    """What a llama-server with these arguments answers."""
    vocabulary = lm.model.config.vocab_size
    with llama_server(model, *arguments) as client:
        return _step_by_step(
            lm, lambda ids: client.logprobs(ids[0].tolist(), vocabulary)[None, None]
        )


def save(lm: Any, folder: Path) -> Path:
    """Save a model and its tokenizer as other runtimes read them."""
    lm.model.save_pretrained(folder)
    lm.tokenizer.save_pretrained(folder)
    return folder


def generated_by(llm: Any, lm: Any) -> Run:
    """Greedy continuations of an engine of vLLM."""
    from vllm import SamplingParams

    settings = {"temperature": 0.0, "max_tokens": NEW_TOKENS, "ignore_eos": True, "logprobs": -1}
    prompts = [{"prompt_token_ids": ids} for ids in lm.encode(PROMPTS)]
    found = [
        one.outputs[0] for one in llm.generate(prompts, SamplingParams(**settings), use_tqdm=False)
    ]
    logprobs = [
        torch.tensor([[step[token].logprob for token in range(len(step))] for step in one.logprobs])
        for one in found
    ]
    return Run([list(one.token_ids) for one in found], logprobs)


RUNTIMES = {
    "TransformerLens": transformer_lens,
    "nnsight": nnsight,
    "vLLM": vllm,
    "llama.cpp, control vector": control_vector,
    "baked, transformers": baked,
    "baked, llama.cpp": baked_llama,
}


def rows(runtime: str, models: list[str]) -> Iterator[dict[str, Any]]:
    """Runtime, model, steering, largest difference and whether the text is equal."""
    prepare = RUNTIMES[runtime]()
    for model in models:
        lm = lirefs.load(model)
        run = prepare(lm)
        for name, steer in steerings(lm).items():
            row = {"runtime": runtime, "model": model, "steering": name}
            try:
                found = run(steer)
            except LirefsError:
                continue  # a scope where hooks see no positions, or no weight that could do it
            reference = hooks(lm, steer)
            row["difference"] = found.difference(reference)
            row["equal"] = found.tokens == reference.tokens
            yield row


def table(found: list[dict[str, Any]]) -> str:
    """The rows in Markdown."""
    columns = ("runtime", "model", "steering", "largest difference", "same text")
    lines = [f"| {' | '.join(columns)} |", f"|{'---|' * len(columns)}"]
    lines += [
        f"| {one['runtime']} | {one['model']} | {one['steering']} | {one['difference']:.1e} | "
        f"{'yes' if one['equal'] else 'no'} |"
        for one in found
    ]
    return "\n".join(lines)


def _elsewhere(python: str, runtime: str, models: list[str]) -> list[dict[str, Any]]:
    """The rows of a runtime that another Python has."""
    command = [python, __file__, "--only", runtime]
    command += [part for model in models for part in ("--model", model)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    # vLLM logs to the same stream, also after the rows.
    found: list[dict[str, Any]] = json.loads(
        next(line for line in done.stdout.splitlines() if line[:2] == "[{")
    )
    return found


def main() -> None:
    """Measure, print the rows as JSON or the table of all."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--vllm", metavar="PYTHON", help="Python of an environment with vLLM")
    parser.add_argument("--model", action="append", help="only this model; may be repeated")
    parser.add_argument("--only", choices=RUNTIMES, help="rows of one runtime, as JSON")
    parser.add_argument("--write", action="store_true", help="put the table into the docs")
    parser.add_argument("--llama", metavar="FOLDER", help="folder that .ci/llama installed")
    options = parser.parse_args()
    if options.llama:
        os.environ[VARIABLE] = options.llama
    models = options.model or list(MODELS)
    if options.only:
        print(json.dumps(list(rows(options.only, models))))
        return
    found = []
    for runtime in RUNTIMES:
        if runtime == "vLLM":
            found += _elsewhere(options.vllm, runtime, models) if options.vllm else []
        elif "llama" not in runtime or VARIABLE in os.environ:
            found += rows(runtime, models)
    print(table(found))
    if options.write:
        text = PAGE.read_text("utf-8")
        head, tail = text.split(BEGIN)[0], text.split(END)[1]
        PAGE.write_text(f"{head}{BEGIN}\n{table(found)}\n{END}{tail}", "utf-8")


if __name__ == "__main__":
    sys.exit(main())
