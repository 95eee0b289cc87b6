"""Seconds to open a GGUF file for the first time, and when its conversion has been kept.

    python benchmarks/opening.py

The file is made here, with random numbers in Q8_0: a Llama of 18 blocks with a vocabulary of
262,144 words, the size of Gemma 3 270M. Each load is a process of its own; all use one new cache.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from random import Random

import gguf
import numpy as np
from measuring import versions

WIDTH, HIDDEN, HEADS = 640, 2048, 10
LOAD = """
import sys, time
import lirefs
lirefs.load
wall, cpu = time.perf_counter(), time.process_time()
lm = lirefs.load(sys.argv[1], device="cpu")
print(time.perf_counter() - wall, time.process_time() - cpu, lm.identity)
"""


def words(n: int) -> tuple[list[str], list[str]]:
    """N words of a byte-level tokenizer, and the merges that make them."""
    rng, found, merges = Random(0), dict.fromkeys(map(chr, range(33, 127))), []
    known = list(found)
    while len(known) < n:
        one, other = known[rng.randrange(min(len(known), n // 8))], rng.choice(known)
        if len(one + other) < 16 and one + other not in found:
            found[one + other] = None
            known.append(one + other)
            merges.append(f"{one} {other}")
    return known, merges


def write(path: Path, vocabulary: int, blocks: int) -> None:
    """A Llama in Q8_0."""
    writer, rng = gguf.GGUFWriter(str(path), "llama"), np.random.default_rng(0)
    known, merges = words(vocabulary - 2)
    writer.add_context_length(2048)
    writer.add_embedding_length(WIDTH)
    writer.add_block_count(blocks)
    writer.add_feed_forward_length(HIDDEN)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(WIDTH // HEADS)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(["<s>", "</s>", *known])
    writer.add_token_types([3, 3] + [1] * len(known))
    writer.add_token_merges(merges)
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    square = dict.fromkeys(("attn_q", "attn_k", "attn_v", "attn_output"), (WIDTH, WIDTH))
    matrices = {"token_embd": (vocabulary, WIDTH)}
    for block in range(blocks):
        shapes = {**square, "ffn_gate": (HIDDEN, WIDTH), "ffn_up": (HIDDEN, WIDTH)}
        shapes["ffn_down"] = (WIDTH, HIDDEN)
        matrices |= {f"blk.{block}.{name}": shape for name, shape in shapes.items()}
    kind = gguf.GGMLQuantizationType.Q8_0
    for name, shape in matrices.items():
        numbers = rng.standard_normal(shape, dtype=np.float32) / WIDTH**0.5
        writer.add_tensor(f"{name}.weight", gguf.quantize(numbers, kind), raw_dtype=kind)
    norms = [f"blk.{b}.{name}" for b in range(blocks) for name in ("attn_norm", "ffn_norm")]
    for name in (*norms, "output_norm"):
        writer.add_tensor(f"{name}.weight", np.ones(WIDTH, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def timed(path: Path, cache: str) -> tuple[float, float, str]:
    """Wall and CPU seconds of a load in a process that has imported all it takes, and the model."""
    done = subprocess.run(
        [sys.executable, "-c", LOAD, str(path)],
        env={**os.environ, "LIREFS_CACHE": cache},
        check=True,
        stdout=subprocess.PIPE,
        text=True,
    )
    wall, cpu, identity = done.stdout.split()
    return float(wall), float(cpu), identity


def main() -> None:
    """Write the file, open it three times, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--vocabulary", type=int, default=262_144)
    parser.add_argument("--blocks", type=int, default=18)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        path, cache = Path(folder) / "model.gguf", f"{folder}/cache"
        write(path, options.vocabulary, options.blocks)
        print(f"{path.stat().st_size / 1e6:.0f} MB, {options.vocabulary:,} words")
        loads = {name: timed(path, cache) for name in ("first load", "second load", "third load")}
        if len({identity for *_, identity in loads.values()}) > 1:
            raise SystemExit("the kept model is another one")
    print("| | wall, s | CPU, s |\n|---|---|---|")
    for name, (wall, cpu, _) in loads.items():
        print(f"| {name} | {wall:.1f} | {cpu:.1f} |")
    print(versions("torch", "transformers", "gguf"))


if __name__ == "__main__":
    main()
