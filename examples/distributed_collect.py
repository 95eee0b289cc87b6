"""Collect curvature with several processes, and resume after an interruption.

    torchrun --nproc-per-node 2 examples/distributed_collect.py MODEL TEXTS OUT [--layers N ...]

Every process gets all batches and works on its share; the sums are added once, at the end. Stop it
with Ctrl-C and start it again: it resumes where it stopped. Without torchrun, it runs as a single
process. Takes two minutes on two cores for 16,000 tokens and a model of 135 M parameters.
"""

import argparse
import os
from pathlib import Path

import torch
import torch.distributed as dist

import kfac
import lirefs

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("model", help="folder or hub id")
parser.add_argument("texts", help="text file, one document per line")
parser.add_argument("out", help="factors file to write")
parser.add_argument("--layers", type=int, nargs="+", help="blocks, counted from 0; default: all")
parser.add_argument("--batch", type=int, default=2048, help="tokens per batch, padding included")
parser.add_argument("--length", type=int, default=512, help="longest part of a text, in tokens")
options = parser.parse_args()

device = "cpu"
if "RANK" in os.environ:
    gpu = torch.cuda.is_available()
    if gpu:
        device = f"cuda:{os.environ['LOCAL_RANK']}"
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if gpu else "gloo")

lm = lirefs.load(options.model, device=device)
lines = Path(options.texts).read_text(encoding="utf-8").splitlines()
ids = lm.encode([line.strip() for line in lines if line.strip()])

factors = kfac.collect(
    lm,
    lm.batches([row[: options.length] for row in ids], options.batch),
    layers=options.layers,
    checkpoint=options.out + ".checkpoint",
    provenance={"model": options.model, "texts": options.texts},
)
if int(os.environ.get("RANK", 0)) == 0:
    factors.save(options.out)
    print(f"wrote {options.out}: {factors}")
if dist.is_initialized():
    dist.destroy_process_group()
