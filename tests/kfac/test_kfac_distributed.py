from dataclasses import astuple

import pytest
import torch
from curvature_tools import assert_same, batch, llama
from processes import run
from torch import nn

import kfac
from kfac import Factors
from kfac.factors import bases
from lirefs.errors import DistributedError

BATCHES = [batch([0, 1]), batch([2]), batch([0, 4], "left", 1), batch([5]), batch([3])]


def everything(batches=BATCHES, model=None, **kwargs):
    torch.set_num_threads(1)
    model = model or llama(torch.float32)
    targets = kfac.find_targets(model, layers=[1], projections="mlp")
    factors = kfac.collect(
        model, batches, targets, marginals=True, diagonal=True, progress=False, **kwargs
    )
    return kfac.correct(model, batches, factors, progress=False)


def work(rank, folder):
    with pytest.raises(DistributedError, match="differ in batches"):
        everything(BATCHES[rank:])
    everything(checkpoint=f"{folder}/state").save(f"{folder}/{rank}.safetensors")
    everything(BATCHES[:1]).save(f"{folder}/short-{rank}.safetensors")
    # The forward pass of the wrapper would wait for the process that has one batch less.
    wrapped = nn.parallel.DistributedDataParallel(llama(torch.float32))
    everything(model=wrapped).save(f"{folder}/wrapped-{rank}.safetensors")
    decompose_together(everything(), rank)


def decompose_together(factors, rank):
    """Each process decomposes its share, all have all bases, and a failure reaches them all."""
    mine, alone = [], kfac.merge([factors])
    right = {name: alone.eigen(name) for name in alone.names}

    def counted(matrix):
        mine.append(len(matrix))
        return kfac.eigenbasis(matrix)

    def failing(matrix):
        raise MemoryError

    bases.eigenbasis = counted
    shared = kfac.merge([factors])
    if rank == 1:
        shared.eigen_A(shared.names[-1])  # what one has already is sent by it
    shared.decompose(spread=True, progress=False)
    assert mine == ([16, 24] if rank == 0 else [24, 24, 16])
    for name, basis in right.items():
        assert all(torch.equal(*both) for both in zip(*map(astuple, (basis, shared.eigen(name)))))
    bases.eigenbasis = failing if rank == 1 else counted
    with pytest.raises(DistributedError if rank == 0 else MemoryError):
        kfac.merge([factors]).decompose(spread=True, progress=False)
    bases.eigenbasis = kfac.eigenbasis


def test_two_processes_give_what_one_gives_and_refuse_different_batches(tmp_path):
    run(work, tmp_path)
    for stem, batches in (("", BATCHES), ("short-", BATCHES[:1])):
        one = everything(batches)
        zero, other = (Factors.load(tmp_path / f"{stem}{rank}.safetensors") for rank in (0, 1))
        assert_same(one, zero, 1e-6)
        assert zero.tokens == one.tokens
        for name in one.names:
            assert torch.equal(zero.G(name), other.G(name))
            for estimator in ("marginal", "diagonal"):
                a, b = (f.curvature(name, estimator).mass() for f in (one, zero))
                assert (a - b).norm() <= 1e-6 * a.norm()
            # Eigenvectors of nearly equal eigenvalues may turn; the total does not depend on them.
            a, b = (f.curvature(name, "ekfac").total for f in (one, zero))
            assert a == pytest.approx(b, rel=1e-6)
    inside = everything()
    for rank in (0, 1):
        wrapped = Factors.load(tmp_path / f"wrapped-{rank}.safetensors")
        assert wrapped.names == [f"module.{name}" for name in inside.names]
        for name in inside.names:
            torch.testing.assert_close(wrapped.G(f"module.{name}"), inside.G(name))
    names = sorted(p.name for p in tmp_path.glob("state*"))
    assert names == ["state.0-of-2", "state.1-of-2"]
