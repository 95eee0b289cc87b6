"""Fuzzed: directions, control vectors, factors and their checkpoints."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from fuzz_values import check, contents, finite, text, tiny_lm, whole, with_and_without, written
from fuzzing import Format
from torch import nn

import kfac
import lirefs
from lirefs.errors import FactorsMismatchError, KfacError
from lirefs.export.gguf import from_gguf, to_gguf


def make_directions(folder: Path) -> list[bytes]:
    some = {}
    for layer, site in ((0, "resid_pre"), (2, "resid_pre"), (2, "mlp_out")):
        vector = torch.randn(8, generator=torch.Generator().manual_seed(layer))
        some[layer, site] = lirefs.Direction(vector, layer, site, (-1.0, 1.5), (0.5, 0.25), (3, 4))
    made = {"model": "0" * 64, "model_name": "tiny", "seed": 0, "sides": {"train": [1, 2.5, None]}}
    lirefs.Directions(some, made).save(folder / "two")
    lirefs.Directions({(0, "resid_pre"): some[0, "resid_pre"]}).save(folder / "one")
    return contents(folder)


def same_directions(one: lirefs.Directions, other: lirefs.Directions) -> bool:
    return (
        one.provenance == other.provenance
        and list(one) == list(other)
        and all(
            torch.equal(a.vector, b.vector)
            and dataclasses.astuple(a)[1:] == dataclasses.astuple(b)[1:]
            for a, b in zip(one.values(), other.values())
        )
    )  # fmt: skip


def read_directions(folder: Path, content: bytes) -> None:
    found = lirefs.Directions.load(written(folder, "d.safetensors", content))
    for (layer, site), one in found.items():
        check(whole(layer) and isinstance(site, str), f"place {layer!r}, {site!r}")
        check(one.vector.dtype == torch.float32 and one.vector.ndim == 1, "vector")
        check(len(one.vector) and bool(one.vector.isfinite().all()), "values")
        for pair in (one.means, one.spread):
            check(type(pair) is tuple and len(pair) == 2 and all(map(finite, pair)), f"{pair!r}")
        check(len(one.counts) == 2 and all(map(whole, one.counts)), f"{one.counts!r}")
    check(len(found) and isinstance(found.provenance, dict), "provenance")
    check(len({len(one.vector) for one in found.values()}) == 1, "widths")
    found.save(folder / "again")
    check(same_directions(found, lirefs.Directions.load(folder / "again")), "differs when saved")
    lirefs.Steer(found, "add", 2.0).describe()
    with contextlib.suppress(lirefs.errors.ProvenanceError):
        lirefs.Directions.load(folder / "again", tiny_lm())


def make_control_vector(folder: Path) -> list[bytes]:
    lm = tiny_lm()
    for name, layers in (("one", [2]), ("two", [1, 3])):
        vectors = {
            (layer, "resid_post"): lirefs.Direction(torch.ones(lm.width), layer, "resid_post")
            for layer in layers
        }
        to_gguf(lirefs.Directions(vectors), folder / name, lm)
    return contents(folder)


def read_control_vector(folder: Path, content: bytes) -> None:
    found = from_gguf(written(folder, "c.gguf", content))
    for (layer, site), one in found.items():
        check(whole(layer) and site == "resid_post", f"{layer!r}, {site!r}")
        check(one.vector.dtype == torch.float32 and one.vector.ndim == 1, "vector")
        check(len(one.vector) and bool(one.vector.isfinite().all()), "values")
    found.save(folder / "again")
    check(same_directions(found, lirefs.Directions.load(folder / "again")), "differs when saved")


# Factors and collections


class Net(nn.Module):
    """Two targets of one input, and one after them."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(4, 6), nn.Linear(4, 6), nn.Linear(6, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.c(torch.tanh(self.a(x)) * self.b(x))


@functools.cache
def net() -> Net:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Net()


@functools.cache
def net_batches() -> list[torch.Tensor]:
    return list(torch.randn(4, 8, 4, generator=torch.Generator().manual_seed(1)))


def forward(model: nn.Module, batch: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return model(batch), torch.ones(len(batch), dtype=torch.bool)


def collected(batches: list[torch.Tensor] | None = None, **settings: Any) -> kfac.Factors:
    targets = kfac.named_targets(net(), ["a", "b", "c"])
    batches = net_batches() if batches is None else batches
    return kfac.collect(
        net(), batches, targets, forward=forward, marginals=True, progress=False, **settings
    )


def make_factors(folder: Path) -> list[bytes]:
    plain = collected(diagonal=True, provenance={"data": ["a", 1.5, None], "hash": "0" * 8})
    plain.save(folder / "plain")
    corrected = kfac.correct(net(), net_batches(), plain, forward=forward, progress=False)
    corrected.save(folder / "corrected")
    return with_and_without(contents(folder))


def read_factors(folder: Path, content: bytes) -> None:
    found = kfac.Factors.load(written(folder, "f.safetensors", content))
    check(whole(found.tokens) and all(type(seed) is int for seed in found.seeds), "counts")
    check(found.labels in ("sampled", "data", "mixed") and found.names, "labels")
    check(type(found.weighted) is bool and isinstance(found.provenance, dict), "provenance")
    for name, record in found.records.items():
        check(text(name) and whole(record.count) and text(record.digest), f"{record!r}")
        for matrix in (found.A(name), found.G(name)):
            check(bool(matrix.isfinite().all()), "matrix")
            apart = float((matrix - matrix.T).abs().max())
            check(apart <= 2e-3 * float(matrix.abs().max()), "not symmetric")
        basis = found.eigen(name)
        for values in vars(basis).values():
            check(bool(values.isfinite().all()), "basis")
        for estimator in found.estimators:
            mass = found.curvature(name, estimator)
            for values in (mass.lam, mass.mu, mass.table):
                check(values is None or bool(values.isfinite().all()), estimator)
    found.save(folder / "again")
    again = kfac.Factors.load(folder / "again")
    check(again.digest == found.digest and again.provenance == found.provenance, "differs")
    if found.tokens:
        with pytest.raises(KfacError, match="given twice"):
            kfac.merge([found, again])
    with contextlib.suppress(FactorsMismatchError):
        kfac.Factors.load(folder / "again", model=net())
        with kfac.CurvatureEdit(found, 0.5).apply(net()):
            pass


def make_checkpoint(folder: Path) -> list[bytes]:
    for name, budget in (("whole", None), ("passes", 1200)):

        def broken(model: nn.Module, batch: torch.Tensor, left: list[int]) -> Any:
            left[0] -= 1
            if not left[0]:
                raise KeyboardInterrupt
            return forward(model, batch)

        path = folder / name
        with contextlib.suppress(KeyboardInterrupt):
            kfac.collect(
                net(),
                net_batches(),
                kfac.named_targets(net(), ["a", "b", "c"]),
                forward=functools.partial(broken, left=[3 if budget is None else 7]),
                marginals=True,
                progress=False,
                checkpoint=path,
                checkpoint_every=0.0,
                budget=budget,
            )
    return with_and_without(contents(folder))


def read_checkpoint(folder: Path, content: bytes) -> None:
    path = written(folder, "c.safetensors", content)
    one_pass = b'\\"passes\\": [[\\"a\\", \\"b\\", \\"c\\"]]' in content
    found = collected(checkpoint=path, budget=None if one_pass else 1200)
    for name, record in found.records.items():
        check(whole(record.count, 1) and record.source in found.records, f"{record!r}")
        check(bool(found.A(name).isfinite().all() and found.G(name).isfinite().all()), "sums")
    check(whole(found.tokens, 1), "tokens")
    found.save(folder / "again")
    check(kfac.Factors.load(folder / "again").digest == found.digest, "differs when saved")


FORMATS: dict[str, Format] = {
    "directions": Format("safetensors", make_directions, read_directions),
    "control vector": Format("gguf", make_control_vector, read_control_vector),
    "factors": Format("safetensors", make_factors, read_factors),
    "collection checkpoint": Format("safetensors", make_checkpoint, read_checkpoint),
}
