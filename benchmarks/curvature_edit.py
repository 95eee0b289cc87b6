"""Decomposition and edit of a block of 7B shape; run by `curvature.py --model blocks`."""

from __future__ import annotations

import argparse
import json
import resource
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from measuring import synchronize
from safetensors.torch import load_file, save_file

Basis = tuple[torch.Tensor, torch.Tensor]
KEEP = 0.6
PARTS = ("first edit", "second edit", "published edit")


def work(options: argparse.Namespace, model: Any, names: list[str], ids: torch.Tensor) -> None:
    """Do one part in this process, and print its times: "factors" or one of PARTS.

    "published edit" is torch's `eigh` of each matrix, pairs from a heap, and both rotations whole.
    """
    import kfac

    torch.set_num_threads(options.threads)
    targets = kfac.named_targets(model, names)
    if options.only == "factors":
        batches = [{"input_ids": part[:, :-1]} for part in ids.split(options.batch)]
        kfac.collect(model, batches, targets, progress=False).save(options.factors)
        print("RESULT {}")
        return
    factors = kfac.Factors.load(options.factors, model)
    result: dict[str, Any] = {}

    def timed(name: str, run: Callable[[], Any]) -> Any:
        synchronize()
        wall, cpu = time.perf_counter(), time.process_time()
        found = run()
        synchronize()
        result[name] = [time.perf_counter() - wall, time.process_time() - cpu]
        return found

    path = Path(options.factors).with_suffix(".edited")
    if options.only == "published edit":
        sides = [factors.A(factors.names[0]), *map(factors.G, factors.names)]
        inner, *outs = timed("decomposition", lambda: [_descending(one) for one in sides])
        edited = timed(
            "edit",
            lambda: {
                target.name: _published(target.weight, out, inner)
                for target, out in zip(targets, outs, strict=True)
            },
        )
        ours = load_file(path)
        result["difference"] = max(
            float((weight.float() - ours[name].float()).norm() / weight.float().norm())
            for name, weight in edited.items()
        )
    else:
        timed("decomposition", factors.decompose)
        edit = kfac.CurvatureEdit(factors, KEEP)
        made = timed("edit", lambda: edit.prepare(model))
        save_file({target.name: weight.contiguous() for target, weight in made}, path)
        result["pairs"] = sum(row.pairs for row in edit.report())
    result["peak MB"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print("RESULT " + json.dumps(result))


def _descending(matrix: torch.Tensor) -> Basis:
    values, vectors = torch.linalg.eigh(matrix.double())
    return values.flip(0).clamp(min=0), vectors.flip(1)


def _published(weight: torch.Tensor, out: Basis, inner: Basis) -> torch.Tensor:
    """Return the edited weight."""
    from selection import heap  # needs kfac, which the peers' environment lacks

    (lam, u_out), (mu, u_in) = out, inner
    counts, _ = heap(lam.cpu().numpy(), mu.cpu().numpy(), KEEP, float("inf"))
    u_out, u_in = u_out.to(weight.device, torch.float32), u_in.to(weight.device, torch.float32)
    kept = u_out.T @ weight.float() @ u_in
    places = torch.arange(kept.shape[1], device=kept.device)
    kept[places[None, :] >= torch.tensor(counts, device=kept.device)[:, None]] = 0
    return (u_out @ kept @ u_in.T).to(weight.dtype)


def compare(options: argparse.Namespace, spawn: Callable[..., dict[str, Any]]) -> None:
    """Print the times of a first edit, a second one from saved eigenbases, and the published."""
    one = argparse.Namespace(**vars(options) | {"blocks": 1})
    with tempfile.TemporaryDirectory() as folder:
        where = ("--factors", str(Path(folder) / "factors.safetensors"))
        spawn(one, "factors", sys.executable, *where)
        parts = {name: spawn(one, name, sys.executable, *where) for name in PARTS}
    pairs, difference = parts["first edit"]["pairs"], parts["published edit"]["difference"]
    print(f"\ngate and up of one block, keep {KEEP}: {pairs:,} pairs kept")
    print(f"edited weights of the published method differ from ours by {difference:.1e}")
    print("\n| | decomposition: wall, CPU s | edit: wall, CPU s | peak MB |\n|---|---|---|---|")
    for name, found in parts.items():
        times = [" ".join(f"{one:.1f}" for one in found[key]) for key in ("decomposition", "edit")]
        print(f"| {name} | {times[0]} | {times[1]} | {found['peak MB']:.0f} |")
