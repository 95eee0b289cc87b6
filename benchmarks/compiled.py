"""Steering under `torch.compile` with a static cache: baked into the weights, and by hooks.

    python benchmarks/compiled.py

Each contender decodes greedily from the same prompts, one token at a time. A baked steering is
compiled like any model. Its strength is then changed by loading other weights into it, and the
graphs that the compiler has made are counted before and after. Hooks make compiled code run
eagerly, so they are compared with both.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from functools import partial

import torch
from measuring import measure, ratios, versions, with_range
from torch import Tensor, nn
from torch._dynamo.utils import counters
from transformers import StaticCache

import lirefs
from lirefs import Direction, Steer, bake

PROMPT = "The library opens at nine and closes at six. On Sundays the reading room stays open and"


def decode(model: nn.Module, call: Callable[..., object], ids: Tensor, tokens: int) -> Tensor:
    """Greedy continuations with a static cache, by calls of `call`."""
    cache = StaticCache(config=model.config, max_cache_len=ids.shape[1] + tokens)
    found = []
    with torch.inference_mode():
        out = model(ids, past_key_values=cache, use_cache=True)  # the prompt, not compiled
        for index in range(tokens):
            found.append(out.logits[:, -1:].argmax(-1))
            positions = torch.full_like(found[-1], ids.shape[1] + index)
            out = call(found[-1], past_key_values=cache, position_ids=positions, use_cache=True)
    return torch.cat(found, dim=1)


def main() -> None:
    """Print seconds, ratios and the number of graphs."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2-135m", help="built-in name, folder or hub id")
    parser.add_argument("--prompts", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    lm = lirefs.load(options.model)
    ids = torch.tensor(lm.encode([PROMPT]) * options.prompts, device=lm.device)
    vector = torch.randn(lm.width, generator=torch.Generator().manual_seed(0))
    layer = lm.n_layers // 2

    def steer(strength: float) -> Steer:
        return Steer(Direction(vector, layer), "add", strength)

    baked = bake(steer(0.5), lm.model)
    compiled, compiled_baked = torch.compile(lm.model), torch.compile(baked)

    def hooked() -> Tensor:
        with steer(0.5).apply(lm.model):
            return decode(lm.model, compiled, ids, options.tokens)

    run = partial(decode, ids=ids, tokens=options.tokens)
    times = measure(
        {
            "compiled": lambda: run(lm.model, compiled),
            "baked, compiled": lambda: run(baked, compiled_baked),
            "not compiled": lambda: run(lm.model, lm.model),
            "hooks": hooked,
        },
        options.rounds,
    )
    same = torch.equal(run(baked, compiled_baked), hooked())
    before = counters["stats"]["unique_graphs"]
    for strength in (1.0, 2.0):
        baked.load_state_dict(bake(steer(strength), lm.model).state_dict())
        run(baked, compiled_baked)
    made = counters["stats"]["unique_graphs"] - before
    print(f"{lm.name}, {lm.device}: {options.prompts} prompts, {options.tokens} tokens, ", end="")
    print(f"{options.rounds} rounds; {versions('torch', 'transformers')}\n")
    print("| | seconds | over compiled [range] |\n|---|---|---|")
    for name, found in times.items():
        over = with_range(ratios(times, name, "compiled"), 3)
        print(f"| {name} | {statistics.median(found):.2f} | {over} |")
    eager = with_range(ratios(times, "hooks", "not compiled"), 3)
    print(f"\nHooks over the model that is not compiled: {eager}.")
    print(f"Graphs made for two other strengths: {made} (before: {before}).")
    print(f"Baked and hooked say the same: {same}.")


if __name__ == "__main__":
    main()
