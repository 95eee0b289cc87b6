import logging
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from curvature_tools import batch, collect, llama
from safetensors import safe_open
from safetensors.torch import save_file

import kfac
from kfac import Factors
from kfac.factors import bases as bases_module
from kfac.factors import eigen as eigen_module
from lirefs.errors import KfacError, SpectrumError, TargetError

BATCHES = [batch(range(6))]


@pytest.fixture(scope="module")
def model():
    return llama(torch.float32)


@pytest.fixture(scope="module")
def collected(model):
    return collect(model, BATCHES, kfac.find_targets(model, projections="mlp"))


@pytest.fixture
def saved(collected, tmp_path):
    collected.save(tmp_path / "f.safetensors", keep_bases=False)
    return tmp_path / "f.safetensors"


@pytest.fixture
def decomposed(monkeypatch):
    """The sides of the matrices that are decomposed, in order."""
    sides = []

    def counted(matrix):
        sides.append(len(matrix))
        return kfac.eigenbasis(matrix)

    monkeypatch.setattr(bases_module, "eigenbasis", counted)
    return sides


def edited(factors, model, keep=0.6):
    with kfac.CurvatureEdit(factors, keep).apply(model):
        return [target.weight.clone() for target in factors.targets(model)]


def files(path):
    folder = path.with_name(path.name + ".bases")
    return sorted(folder.iterdir()) if folder.exists() else []


def test_bases_are_kept_and_the_second_run_decomposes_nothing(model, saved, decomposed):
    first = edited(Factors.load(saved), model)
    assert len(decomposed) == 10  # of 6 targets: gate and up share their A
    assert len(files(saved)) == 10
    del decomposed[:]
    again = Factors.load(saved)
    for one, two in zip(first, edited(again, model), strict=True):
        assert torch.equal(one, two)
    assert not decomposed
    assert again.digest == Factors.load(saved, keep_bases=False).digest
    assert again.eigen_A(again.names[0])[1].dtype == torch.float64


def test_files_are_read_when_needed_and_mapped_into_memory(saved):
    def mapped():
        text = Path("/proc/self/maps").read_text()
        return sum(str(path) in text for path in files(saved))

    first, again = Factors.load(saved), Factors.load(saved)
    first.decompose(progress=False)
    assert mapped() == 10  # so the memory of a finished basis can be taken back
    first.forget(first.names)
    assert mapped() == 0
    assert again.eigen_A(again.names[0])[1].isfinite().all()
    assert mapped() == 1


def test_known_bases_are_saved_and_those_of_other_factors_removed(collected, model, tmp_path):
    path = tmp_path / "f.safetensors"
    other = collect(model, [batch([0, 1])], collected.targets(model))
    other.decompose(progress=False)
    other.save(path)
    before = files(path)
    assert len(before) == 10
    mine = before[0].with_name("notes.txt")
    mine.write_text("a user's own file")
    half = kfac.merge([collected])
    half.eigen(half.names[0])
    half.save(path)
    assert len(files(path)) == 3
    assert mine in files(path)
    assert not set(before) & set(files(path))
    assert len(list(Factors.load(path)._bases)) == 2
    without = tmp_path / "without.safetensors"
    half.save(without, keep_bases=False)
    kfac.merge([collected]).eigen(half.names[0])
    assert not files(without)


def test_a_base_of_other_factors_is_never_used(collected, model, saved, decomposed):
    edited(Factors.load(saved), model)
    other = collect(model, [batch([0, 1])], collected.targets(model))
    path = saved.with_name("other.safetensors")
    other.save(path, keep_bases=False)
    shutil.copytree(f"{saved}.bases", f"{path}.bases")
    for mine, theirs in zip(files(path), reversed(files(saved)), strict=True):
        shutil.copyfile(theirs, mine)  # each under the name of another one, too
    del decomposed[:]
    edited(Factors.load(path), model)
    assert len(decomposed) == 10
    shutil.rmtree(f"{saved}.bases")
    shutil.copytree(f"{path}.bases", f"{saved}.bases")
    name = collected.names[0]
    key = Factors.load(saved)
    right = key.eigen_A(name)[0]
    torch.testing.assert_close(right, kfac.eigenbasis(collected.A(name))[0])


def damage(path, how):
    if how == "truncated":
        path.write_bytes(path.read_bytes()[:-100])
        return
    if how == "empty":
        path.write_bytes(b"")
        return
    with safe_open(path, framework="pt") as file:
        header = file.metadata()
        tensors = {key: file.get_tensor(key).clone() for key in ("values", "vectors")}
    if how == "header":
        header = {"kfac_basis": "{}"}
    elif how == "missing":
        del tensors["vectors"]
    elif how == "shape":
        tensors["vectors"] = tensors["vectors"][:, :-1].contiguous()
    else:
        tensors["vectors"][0, 0] = torch.nan if how == "nan" else tensors["vectors"][0, 0] + 1e-12
    save_file(tensors, path, metadata=header)


@pytest.mark.parametrize("how", ["truncated", "empty", "header", "missing", "shape", "nan", "bit"])
def test_damaged_bases_are_computed_again(model, saved, decomposed, caplog, how):
    right = edited(Factors.load(saved), model)
    for path in files(saved):
        damage(path, how)
    del decomposed[:]
    with caplog.at_level(logging.WARNING):
        for one, two in zip(right, edited(Factors.load(saved), model), strict=True):
            assert torch.equal(one, two)
    assert len(decomposed) == 10
    assert "computed again" in caplog.text
    del decomposed[:]
    edited(Factors.load(saved), model)
    assert not decomposed  # the damaged files were replaced


def test_an_interrupted_decomposition_goes_on_where_it_stopped(saved, monkeypatch):
    done = []

    def stopped(matrix):
        if len(done) == 4:
            raise KeyboardInterrupt
        done.append(len(matrix))
        return kfac.eigenbasis(matrix)

    monkeypatch.setattr(bases_module, "eigenbasis", stopped)
    with pytest.raises(KeyboardInterrupt):
        Factors.load(saved).decompose(progress=False)
    assert len(files(saved)) == 4
    del done[:]
    again = Factors.load(saved)
    with pytest.raises(KeyboardInterrupt):
        again.decompose(progress=False)
    assert len(files(saved)) == 8
    del done[:]
    again.decompose(progress=False)  # in the same process
    assert len(done) == 2


def test_a_folder_that_cannot_be_written_does_not_stop_an_edit(model, saved, caplog):
    saved.with_name(saved.name + ".bases").write_text("a file where the folder would be")
    with caplog.at_level(logging.WARNING):
        edited(Factors.load(saved), model)
    assert "cannot be written" in caplog.text


def test_bands_and_flat_shares_decompose_the_inputs_alone(model, saved, decomposed):
    factors = Factors.load(saved)
    kfac.band_profile(model, BATCHES, factors)
    kfac.flat_shares(model, BATCHES, factors)
    assert decomposed == [16, 24, 16, 24]  # the widths of the inputs of gate and down, twice
    assert {key[0] for key in factors._bases} == {"A"}
    assert factors.curvature(factors.names[0], "input").lam.tolist() == [1.0] * 24
    assert len(decomposed) == 4
    factors.curvature(factors.names[0], "output")
    assert len(decomposed) == 5


def test_edits_decompose_what_they_need(model, collected, decomposed):
    factors = kfac.merge([collected])
    name = factors.names[0]
    kfac.CurvatureEdit(factors, {name: 0.5, factors.names[2]: 1}).prepare(model)
    assert decomposed == [16, 24]
    diagonal = collect(model, BATCHES, kfac.find_targets(model), diagonal=True)
    kfac.CurvatureEdit(diagonal, 0.5, estimator="diagonal").prepare(model)
    kfac.UnionEdit(diagonal, diagonal, 0.5).prepare(model)
    assert decomposed == [16, 24]


def test_decompose_shows_each_basis_and_refuses_other_sides(collected, monkeypatch):
    shown = []

    class Bar(bases_module.tqdm):
        def __init__(self, **settings):
            super().__init__(**settings | {"delay": 0})
            shown.append((self.total, settings["disable"]))

        def set_postfix_str(self, text, refresh):
            shown.append(text)

    monkeypatch.setattr(bases_module, "tqdm", Bar)
    factors = kfac.merge([collected])
    name = factors.names[0]
    factors.decompose([name])
    factors.decompose([name], progress=False)
    assert shown[0] == (2, None)  # None: for a terminal only
    assert shown[1:3] == [f"A.{name}", f"G.{name}"]
    assert shown[3] == (0, True)
    with pytest.raises(KfacError, match="use 'A', 'G' or 'AG'"):
        factors.decompose(sides="B")
    with pytest.raises(TargetError, match="no factors for target 'x'"):
        factors.decompose(["x"])


def test_a_full_device_falls_back_to_the_cpu(monkeypatch, caplog):
    def full(matrix):
        raise torch.OutOfMemoryError("CUDA out of memory")

    matrix = torch.diag(torch.tensor([1.0, 3.0, 2.0]))
    right = kfac.eigenbasis(matrix)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(
        torch.Tensor,
        "to",
        lambda self, *args, to=torch.Tensor.to: (
            self if args == (torch.device("cuda"),) else to(self, *args)
        ),
    )
    places = []
    cpu = torch.linalg.eigh
    monkeypatch.setattr(torch.linalg, "eigh", lambda m: places.append(m.dtype) or cpu(m))
    torch.testing.assert_close(kfac.eigenbasis(matrix), right)
    assert places == [torch.float64]
    monkeypatch.setattr(torch.linalg, "eigh", full)
    with caplog.at_level(logging.WARNING, logger=eigen_module.__name__):
        values, vectors = kfac.eigenbasis(matrix)
    assert torch.equal(values, right[0])
    assert torch.equal(vectors, right[1])
    assert "out of memory; the CPU does" in caplog.text


def test_eigenbasis_has_float64_accuracy_along_flat_directions():
    generator = np.random.default_rng(0)
    basis = np.linalg.qr(generator.standard_normal((60, 60)))[0]
    spectrum = np.logspace(2, -8, 60)
    spectrum[40:] = spectrum[40]  # a flat tail of equal eigenvalues
    matrix = torch.from_numpy(basis * spectrum @ basis.T)
    values, vectors = kfac.eigenbasis(matrix)
    assert float((values - torch.from_numpy(spectrum)).abs().max()) < 1e-13 * spectrum[0]
    torch.testing.assert_close(vectors.T @ vectors, torch.eye(60).double(), rtol=0, atol=1e-13)
    assert np.linalg.norm(basis[:, :40].T @ vectors[:, 40:].numpy()) < 1e-6


@pytest.mark.parametrize(("lacking", "expected"), [
    ([["a", "b", "c", "d"]] * 2, {"a": 0, "b": 1, "c": 1, "d": 1}),
    ([["a", "d"], ["a", "b", "d"]], {"a": 0, "b": 0, "d": 1}),  # b is sent by the one that has it
    ([[], []], {}),
])  # fmt: skip
def test_owners_share_the_cost(lacking, expected):
    sizes = {"a": 100, "b": 60, "c": 60, "d": 40}
    assert bases_module._owners("abcd", lacking, sizes) == expected


def test_not_finite_factors_are_refused(collected):
    factors = kfac.merge([collected])
    factors.sums["G." + factors.names[0]][0, 0] = torch.inf
    with pytest.raises(SpectrumError, match="NaN or infinity"):
        factors.decompose()


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_an_eigenbasis_needs_a_finite_matrix(value):
    matrix = torch.eye(5)
    matrix[3, 1] = value
    with pytest.raises(SpectrumError, match="NaN or infinity"):
        kfac.eigenbasis(matrix)
    with pytest.raises(SpectrumError, match=r"not one of shape \(0, 0\)"):
        kfac.eigenbasis(torch.zeros(0, 0))
