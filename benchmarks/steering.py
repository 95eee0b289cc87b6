"""The cost of capture and steering, as ratios in one run, with peers on the same prompts.

    python benchmarks/steering.py --peers

TransformerLens and nnsight run in this process. With `--peers`, steering-vectors and repeng run as
well, in a separate environment, which is created once.

Every round runs every variant once, so that a slow minute of the machine affects all of them; a
ratio is the median over rounds of the ratio within a round, with the lowest and the highest. Peers
in the other environment run after ours, so their capture has no range. Times are of whole calls.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import statistics
import subprocess
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from measuring import environment, measure, ratios, versions, with_range
from steering_peers import PACKAGES

import lirefs
from lirefs.directions.capture import BATCH_TOKENS
from lirefs.model.batching import batches_by_tokens

WORDS = "the of river seven because light answer under machine green count little before"
BATCH = 8


def prompts_of(count: int) -> list[str]:
    """Prompts of 8 to 64 words, not sorted by length."""
    words = WORDS.split()
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(8, 65, (count,), generator=generator).tolist()
    return [
        " ".join(words[(i * 7 + j * j) % len(words)] for j in range(n))
        for i, n in enumerate(lengths)
    ]


def capture_variants(lm: lirefs.LanguageModel, prompts: list[str]) -> dict[str, Callable[[], Any]]:
    """Last-token states at the input of every block: ours, and a bare forward pass."""
    ids = lm.encode(prompts)

    class Stop(Exception):
        pass

    def stop(*_: Any) -> None:
        raise Stop

    def bare() -> None:
        hook = lm.layout.block(lm.model, lm.n_layers - 1).register_forward_pre_hook(stop)
        try:
            for rows in batches_by_tokens([len(row) for row in ids], BATCH_TOKENS):
                with suppress(Stop), torch.no_grad():
                    lm.model(**lm.pad([ids[row] for row in rows]), use_cache=False)
        finally:
            hook.remove()

    return {
        "bare forward": bare,
        "lirefs": lambda: lirefs.capture(lm, prompts, progress=False),
    }


def generation_variants(
    lm: lirefs.LanguageModel, prompts: list[str], tokens: int
) -> dict[str, Callable[[], Any]]:
    """Greedy generation: not steered, steered in several ways, and baked."""
    generator = torch.Generator().manual_seed(1)
    vector = torch.randn(lm.width, generator=generator)
    one = lirefs.Direction(vector / vector.norm(), lm.n_layers // 2, "resid_post")
    never = lirefs.scope.mask([False])
    settings = {"max_new_tokens": tokens, "min_new_tokens": tokens}

    def steered(*args: Any, **kwargs: Any) -> Callable[[], Any]:
        steer = lirefs.Steer(one, *args, **kwargs)

        def run() -> None:
            with steer.apply(lm.model):
                lm.generate(prompts, **settings)

        return run

    variants = {
        "not steered": lambda: lm.generate(prompts, **settings),
        "one layer": steered("add"),
        "all layers": steered("add", layers="all"),
        "all layers, ablate": steered("ablate", layers="all"),
        "all layers, generated tokens": steered("add", layers="all", scope="generated"),
        "all layers, empty scope": steered("add", layers="all", scope=never),
    }
    baked = lirefs.wrap(lirefs.bake(lirefs.Steer(one, "add", layers="all"), lm.model), lm.tokenizer)
    variants["all layers, baked"] = lambda: baked.generate(prompts, **settings)
    return variants


def transformer_lens(
    lm: lirefs.LanguageModel, prompts: list[str], texts: list[str], tokens: int
) -> Any:
    """Capture and generation with TransformerLens, on a copy because it changes the model."""
    from transformer_lens.model_bridge import TransformerBridge

    with tempfile.TemporaryDirectory() as folder:
        lm.model.save_pretrained(folder)
        lm.tokenizer.save_pretrained(folder)
        model = copy.deepcopy(lm.model)
        tokenizer = type(lm.tokenizer).from_pretrained(folder)
        bridge = TransformerBridge.boot_transformers(folder, hf_model=model, tokenizer=tokenizer)
    bridge.tokenizer.pad_token = bridge.tokenizer.pad_token or bridge.tokenizer.eos_token
    names = [f"blocks.{layer}.hook_in" for layer in range(lm.n_layers)]
    vector = torch.ones(lm.width, device=lm.device) / lm.width**0.5

    def add(h: Any, hook: Any) -> Any:
        return h + vector

    def capture() -> None:
        for start in range(0, len(prompts), BATCH):
            ids = bridge.to_tokens(prompts[start : start + BATCH], padding_side="left")
            with torch.no_grad():
                _, cache = bridge.run_with_cache(ids, names_filter=names)
            torch.stack([cache[name][:, -1] for name in names])

    ids = lm.pad(lm.encode(texts))["input_ids"]

    def generate() -> None:
        hooks = [(f"blocks.{layer}.hook_out", add) for layer in range(lm.n_layers)]
        with bridge.hooks(fwd_hooks=hooks), torch.no_grad():
            bridge.generate(
                ids,
                max_new_tokens=tokens,
                stop_at_eos=False,
                do_sample=False,
                use_past_kv_cache=True,
                verbose=False,
            )

    return capture, generate


def nnsight(lm: lirefs.LanguageModel, prompts: list[str], texts: list[str], tokens: int) -> Any:
    """Capture and generation with nnsight."""
    from nnsight import save
    from nnsight.modeling.transformers import TransformersModel

    tokenizer = copy.deepcopy(lm.tokenizer)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    model = TransformersModel(copy.deepcopy(lm.model), tokenizer=tokenizer, task="text-generation")
    layers = model.get(lm.layout.blocks)
    vector = torch.ones(lm.width, device=lm.device) / lm.width**0.5

    def capture() -> None:
        for start in range(0, len(prompts), BATCH):
            with torch.no_grad(), model.trace(prompts[start : start + BATCH]) as tracer:
                states = save([])
                for layer in layers:
                    states.append(layer.input[:, -1])
                tracer.stop()
            torch.stack(states)

    def generate() -> None:
        with (
            torch.no_grad(),
            model.generate(
                texts, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False
            ) as tracer,
        ):
            for _ in tracer.iter[:tokens]:
                for layer in layers:
                    layer.output = layer.output + vector

    return capture, generate


def run_peer(python: Path, name: str, folder: str, job: dict[str, Any]) -> dict[str, Any]:
    """Run `steering_peers.py` in the peers' environment."""
    done = subprocess.run(
        [str(python), str(Path(__file__).with_name("steering_peers.py")), name, folder],
        input=json.dumps(job),
        capture_output=True,
        text=True,
        check=True,
        env={key: value for key, value in os.environ.items() if key != "PYTHONPATH"},
        timeout=3600,
    )
    return dict(json.loads(done.stdout.splitlines()[-1]))


def reason(problem: Exception) -> str:
    """A line that says why a peer was skipped."""
    text = getattr(problem, "stderr", None) or str(problem) or type(problem).__name__
    return f"skipped: {text.strip().splitlines()[-1][:120]}"


def table(title: str, rows: list[tuple[str, str, str]]) -> None:
    """Print rows of name, time, ratio."""
    width = max(len(name) for name, _, _ in rows)
    print(f"\n{title}")
    for name, seconds, share in rows:
        print(f"  {name:{width}}  {seconds:>9}  {share}")


def main() -> None:
    """Measure, then print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2-135m", help="name, folder or hub id")
    parser.add_argument("--prompts", type=int, default=64, help="prompts to capture")
    parser.add_argument("--tokens", type=int, default=32, help="new tokens for each of 8 prompts")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--peers", action="store_true", help="also steering-vectors and repeng")
    parser.add_argument("--peers-folder", type=Path, default=Path(".peers/steering"))
    args = parser.parse_args()
    lm = lirefs.load(args.model)
    prompts, texts = prompts_of(args.prompts), prompts_of(BATCH)
    capture = capture_variants(lm, prompts)
    generation = generation_variants(lm, texts, args.tokens)
    skipped: dict[str, str] = {}
    for name, peer in {"TransformerLens": transformer_lens, "nnsight": nnsight}.items():
        try:
            captures, generates = peer(lm, prompts, texts, args.tokens)
            captures()
            generates()
            capture[name], generation[f"all layers, {name}"] = captures, generates
        except Exception as problem:  # if one peer fails, the others still run
            skipped[name] = reason(problem)
    captured = measure(capture, args.rounds)
    generated = measure(generation, args.rounds)
    rows = [
        (name, f"{statistics.median(t):.3f} s", with_range(ratios(captured, "lirefs", name)))
        for name, t in captured.items()
    ]
    costs = [
        (
            name,
            f"{statistics.median(t):.3f} s",
            with_range(ratios(generated, name, "not steered"), 3),
        )
        for name, t in generated.items()
    ]
    used = [versions("torch", "transformers", "transformer-lens", "nnsight")]
    if args.peers:
        job = {
            "prompts": prompts,
            "texts": texts,
            "tokens": args.tokens,
            "rounds": args.rounds,
            "threads": torch.get_num_threads(),
        }
        with tempfile.TemporaryDirectory() as folder:
            lm.model.save_pretrained(folder)
            lm.tokenizer.save_pretrained(folder)
            for name in PACKAGES:
                try:
                    packages = [*PACKAGES.values(), "transformers<5"]
                    python = environment(args.peers_folder, packages)
                    times = run_peer(python, name, folder, job)
                except Exception as problem:  # no index or no wheel: report it and continue
                    skipped[name] = reason(problem)
                    continue
                ours = statistics.median(captured["lirefs"])
                spent = statistics.median(times["capture"])
                rows.append((name, f"{spent:.3f} s", f"{ours / spent:.2f}"))
                share = with_range(ratios(times, "generate", "plain"), 3)
                used.append(times["versions"])
                spent = statistics.median(times["generate"])
                costs.append(
                    (
                        f"all layers, {name}",
                        f"{spent:.3f} s",
                        f"{share} (its own plain run = 1)",
                    )
                )
    table(f"Capture, {len(prompts)} prompts, all layers (throughput, ours = 1)", rows)
    table(f"Generation, batch {BATCH}, {args.tokens} tokens (time, not steered = 1)", costs)
    print(f"\n{args.rounds} rounds; {'; '.join(used)}")
    for name, why in skipped.items():
        print(f"  {name}: {why}")


if __name__ == "__main__":
    main()
