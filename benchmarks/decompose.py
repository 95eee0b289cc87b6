"""Decompositions of a symmetric matrix that are at hand: time, memory and accuracy of each.

    python benchmarks/decompose.py --sizes 2048 4096 11008 --kinds decaying clustered deficient

Every routine runs in a process of its own, on all cores or on CUDA, on the same matrix. Errors are
against `torch.linalg.eigh` in float64, which is the first one listed.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import re
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import numpy as np
import scipy.linalg
import torch
from measuring import versions
from torch import Tensor

from kfac import eigenbasis
from kfac.factors import eigen

Decomposed = tuple[Tensor, Tensor]


def made_matrix(size: int, kind: str) -> Tensor:
    """A second moment of 4 x size samples, (size, size) float64.

    "decaying": standard deviations over four decades and one massive direction. "clustered": the
    same, and the flatter half of the spectrum is one value. "deficient": size / 2 samples.
    """
    generator = torch.Generator().manual_seed(0)
    units = torch.nn.functional.normalize(
        torch.randn(4, size, generator=generator, dtype=torch.float64)
    )

    def mixed(rows: Tensor) -> Tensor:  # reflected four times, so that no axis is an eigenvector
        for unit in units:
            rows = rows - 2 * torch.outer(rows @ unit, unit)
        return rows

    scales = torch.logspace(0, -4, size, dtype=torch.float64)
    scales[0] = 30.0
    if kind == "clustered":
        scales[size // 2 :] = scales[size // 2]
        total = mixed(mixed(torch.diag(scales.square())).T)
        return (total + total.T) / 2
    total = torch.zeros(size, size, dtype=torch.float64)
    for _ in range(4):
        share = size // 8 if kind == "deficient" else size
        rows = torch.randn(share, size, generator=generator, dtype=torch.float64)
        rows = mixed(rows * scales)
        total.addmm_(rows.T, rows)
    return (total + total.T) / (2 * size)


def refined(matrix: Tensor, rounds: int) -> Decomposed:
    """A float32 decomposition refined in float64 (Ogita and Aishima 2018, algorithm 1).

    Each round takes four products. Eigenvalues nearer than the error of the round are not told
    apart: their eigenvectors are made orthogonal and left turned against each other.
    """
    vectors = torch.linalg.eigh(matrix.float()).eigenvectors.double()
    for _ in range(rounds):
        excess = -(vectors.T @ vectors)
        excess.diagonal().add_(1)
        moved = vectors.T @ (matrix @ vectors)
        values = moved.diagonal() / (1 - excess.diagonal())
        off = (moved - torch.diag(values)).norm()  # at least the spectral norm of the paper
        near = 2 * (off + values.abs().max() * excess.norm())
        gaps = values[None, :] - values[:, None]
        change = (moved + excess * values[None, :]) / gaps
        change = torch.where(gaps.abs() > near, change, excess / 2)
        vectors = vectors + vectors @ change
    values = (vectors * (matrix @ vectors)).sum(0)
    order = values.argsort()
    return values[order], vectors[:, order]


def by_scipy(driver: str, dtype: type) -> Callable[[Tensor], Decomposed]:
    """One of scipy's drivers of LAPACK."""

    def run(matrix: Tensor) -> Decomposed:
        values, vectors = scipy.linalg.eigh(
            matrix.numpy().astype(dtype), driver=driver, overwrite_a=True, check_finite=False
        )
        return torch.from_numpy(values).double(), torch.from_numpy(vectors).double()

    return run


def on_cuda(matrix: Tensor) -> Decomposed:
    """cuSOLVER, with the copies to and from the device."""
    values, vectors = torch.linalg.eigh(matrix.cuda())
    return values.cpu(), vectors.cpu()


def ours(matrix: Tensor) -> Decomposed:
    """What kfac does, in ascending order."""
    values, vectors = eigenbasis(matrix)
    return values.flip(0), vectors.flip(1)


def ours_through_torch(matrix: Tensor) -> Decomposed:
    """What kfac did before: the same with torch's `eigh`."""
    with mock.patch.object(eigen, "_on_cpu", torch.linalg.eigh):
        return ours(matrix)


ROUTINES: dict[str, Callable[[Tensor], Decomposed]] = {
    "torch syevd": lambda matrix: tuple(torch.linalg.eigh(matrix)),
    "numpy syevd": lambda matrix: tuple(map(torch.from_numpy, np.linalg.eigh(matrix.numpy()))),
    "scipy syevd": by_scipy("evd", np.float64),
    "scipy syevr": by_scipy("evr", np.float64),
    "scipy syevx": by_scipy("evx", np.float64),
    "scipy syev": by_scipy("ev", np.float64),
    "torch float32": lambda matrix: tuple(
        one.double() for one in torch.linalg.eigh(matrix.float())
    ),
    "scipy float32": by_scipy("evd", np.float32),
    "refined once": lambda matrix: refined(matrix, 1),
    "refined twice": lambda matrix: refined(matrix, 2),
    "kfac (torch)": ours_through_torch,
    "kfac.eigenbasis": ours,
    "torch CUDA": on_cuda,
}


def peak_memory(reset: bool = False) -> int:
    """Largest memory of this process in bytes, since the last reset (Linux)."""
    if reset:
        Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")
    line = re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text("utf-8"))
    assert line is not None
    return int(line[1]) * 1024


SLOW = ("scipy syevx", "scipy syev")
"""Routines that are measured up to 2048 alone."""


def measured(routine: str, folder: Path, out: str) -> None:
    """Run one routine in this process, and write what it took and how exact it is."""
    matrix = torch.from_numpy(np.load(folder / "matrix.npy"))
    warm = torch.eye(64, dtype=torch.float64)
    ROUTINES[routine](warm)
    before = peak_memory(reset=True)
    wall, cpu = time.perf_counter(), time.process_time()
    values, vectors = ROUTINES[routine](matrix)
    found = {"wall": time.perf_counter() - wall, "cpu": time.process_time() - cpu}
    found["memory"] = (peak_memory() - before) / (8 * matrix.numel())  # in matrices
    reference = folder / "reference.npz"
    if not reference.exists():
        np.savez(reference, values=values.numpy(), vectors=vectors.numpy())
    known = np.load(reference)
    top, half = float(values[-1]), len(values) // 2
    found["eigenvalues"] = float((values - torch.from_numpy(known["values"])).abs().max()) / top
    found["residual"] = float((matrix @ vectors - vectors * values).norm()) / top
    gram = vectors.T @ vectors
    gram.diagonal().sub_(1)
    found["orthogonality"] = float(gram.abs().max())
    sharp = torch.from_numpy(known["vectors"])[:, half:]
    found["flat half"] = float((sharp.T @ vectors[:, :half]).norm()) * 2**0.5
    Path(out).write_text(json.dumps(found), encoding="utf-8")


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", type=int, nargs="+", default=[1024, 2048])
    parser.add_argument("--kinds", nargs="+", default=["decaying"])
    parser.add_argument("--routines", nargs="+", choices=ROUTINES, default=list(ROUTINES))
    parser.add_argument("--json", type=Path, help="Write the numbers to this file.")
    options = parser.parse_args()
    print(f"{os.cpu_count()} cores, {torch.get_num_threads()} threads; ", end="")
    print(versions("torch", "numpy", "scipy"))
    context = multiprocessing.get_context("spawn")
    rows = []
    for size in options.sizes:
        for kind in options.kinds:
            with tempfile.TemporaryDirectory() as name:
                folder = Path(name)
                np.save(folder / "matrix.npy", made_matrix(size, kind).numpy())
                first = "torch syevd"
                for routine in dict.fromkeys([first, *options.routines]):
                    if (routine == "torch CUDA" and not torch.cuda.is_available()) or (
                        routine in SLOW and size > 2048
                    ):
                        continue
                    out = folder / "found.json"
                    out.unlink(missing_ok=True)
                    process = context.Process(target=measured, args=(routine, folder, str(out)))
                    process.start()
                    process.join()
                    if not out.exists():
                        print(f"{size:6d} {kind:10s} {routine:16s} failed", flush=True)
                        continue
                    found = json.loads(out.read_text("utf-8"))
                    rows.append({"size": size, "kind": kind, "routine": routine, **found})
                    shown = "  ".join(f"{key} {value:.3g}" for key, value in found.items())
                    print(f"{size:6d} {kind:10s} {routine:16s} {shown}", flush=True)
    if options.json is not None:
        options.json.write_text(json.dumps(rows, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
