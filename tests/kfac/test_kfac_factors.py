import json
import os
from dataclasses import asdict

import pytest
import torch
from curvature_tools import assert_same, batch, build, collect, llama
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

import kfac
from kfac import Factors
from lirefs.errors import FactorsFileError, FactorsMismatchError, KfacError, TargetError


@pytest.fixture(scope="module")
def model():
    return llama(torch.float32)


@pytest.fixture(scope="module")
def factors(model):
    return collect(model, [batch(range(6))], provenance={"data": "toy", "n": 6})


def test_merge_equals_one_pass(model, factors):
    parts = [[batch([0, 1, 2])], [batch([3, 4]), batch([5])]]
    halves = kfac.merge([collect(model, part) for part in parts])
    assert_same(factors, halves)
    assert halves.tokens == factors.tokens
    assert halves.seeds == [0, 0]
    assert halves.provenance == {"merged": [{}, {}]}


def test_merge_refuses(model, factors):
    with pytest.raises(FactorsMismatchError, match="targets differ"):
        kfac.merge([factors, collect(model, [batch([0])], kfac.find_targets(model, layers=[0]))])
    other = llama(torch.float32)
    with torch.no_grad():
        other.model.layers[1].mlp.up_proj.weight.mul_(2)
    with pytest.raises(FactorsMismatchError, match=r"layers\.1\.mlp\.up_proj"):
        kfac.merge([factors, collect(other, [batch([0])])])


def test_save_and_load(tmp_path, model, factors):
    path = tmp_path / "new folder" / "f.safetensors"
    factors.save(path)
    loaded = Factors.load(path, model=model)
    assert loaded.records == factors.records
    assert loaded.provenance == {"data": "toy", "n": 6}
    assert (loaded.seeds, loaded.tokens) == (factors.seeds, factors.tokens)
    assert loaded.digest == factors.digest
    for name in factors.names:
        assert torch.equal(loaded.A(name), factors.A(name))
        assert torch.equal(loaded.G(name), factors.G(name))
    assert [p.name for p in path.parent.iterdir()] == ["f.safetensors"]
    with safe_open(str(path), framework="pt") as file:
        header = json.loads(file.metadata()["kfac_factors"])
        assert sum(key.startswith("A.") for key in file.keys()) == 2  # noqa: SIM118
    assert header["format"] == 1
    assert header["version"]


def test_failed_save_leaves_the_old_file(tmp_path, model, factors):
    path = tmp_path / "f.safetensors"
    factors.save(path)
    before = path.read_bytes()
    broken = collect(model, [batch([0])], provenance={"bad": 1})
    broken.provenance["bad"] = object()
    with pytest.raises(KfacError, match="JSON"):
        broken.save(path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_a_saved_file_has_the_permissions_that_the_user_gives(tmp_path, factors):
    before = os.umask(0o027)
    try:
        factors.save(tmp_path / "f.safetensors")
    finally:
        os.umask(before)
    assert (tmp_path / "f.safetensors").stat().st_mode & 0o777 == 0o640


def change_header(path, **values):
    with safe_open(str(path), framework="pt") as file:
        header = json.loads(file.metadata()["kfac_factors"]) | values
        header.pop("sha256", None)  # it would notice first
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    save_file(tensors, path, metadata={"kfac_factors": json.dumps(header)})


def test_bad_files(tmp_path, factors):
    path = tmp_path / "f.safetensors"
    with pytest.raises(FactorsFileError, match="cannot be read"):
        Factors.load(path)
    factors.save(path)
    whole = path.read_bytes()
    for size in (0, 5, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:size])
        with pytest.raises(FactorsFileError):
            Factors.load(path)
    path.write_text("not a safetensors file at all")
    with pytest.raises(FactorsFileError):
        Factors.load(path)
    save_file({"x": torch.zeros(1)}, path)
    with pytest.raises(FactorsFileError, match="holds no factors"):
        Factors.load(path)
    path.write_bytes(whole)
    change_header(path, format=99)
    with pytest.raises(FactorsFileError, match="99"):
        Factors.load(path)
    path.write_bytes(whole)
    change_header(path, targets={})
    with pytest.raises(FactorsFileError, match="damaged"):
        Factors.load(path)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"tokens": -1}, "whole numbers"),
        ({"tokens": 1e400}, "whole numbers"),
        ({"seeds": "0"}, "seeds"),
        ({"labels": "guessed"}, "labels"),
        ({"provenance": []}, "provenance"),
        ({"weighted": 2}, "weighted"),
        ({"targets": []}, "damaged"),
    ],
)
def test_a_header_that_makes_no_sense_is_refused(tmp_path, factors, change, says):
    factors.save(tmp_path / "f")
    change_header(tmp_path / "f", **change)
    with pytest.raises(FactorsFileError, match=says):
        Factors.load(tmp_path / "f")


@pytest.mark.parametrize(
    ("field", "value"),
    [("count", True), ("in_features", -16), ("source", "nothing"), ("digest", 1), ("more", 1)],
)
def test_a_record_that_makes_no_sense_is_refused(tmp_path, factors, field, value):
    factors.save(tmp_path / "f")
    targets = {name: asdict(record) for name, record in factors.records.items()}
    targets[factors.names[-1]][field] = value
    change_header(tmp_path / "f", targets=targets)
    with pytest.raises(FactorsFileError, match="damaged"):
        Factors.load(tmp_path / "f")


def test_sums_that_are_no_second_moments_are_refused(tmp_path, factors):
    key = "G." + factors.names[0]
    for value, says in ((torch.nan, "not finite"), (1e6, "not symmetric")):
        wrong = factors.sums[key].clone()
        wrong[0, 1] = value
        Factors(
            factors.records, factors.sums | {key: wrong}, seeds=[0], tokens=factors.tokens
        ).save(tmp_path / "f")
        with pytest.raises(FactorsFileError, match=says):
            Factors.load(tmp_path / "f")


def test_headers_that_are_no_object_are_refused(tmp_path):
    for header in ("[]", "[" * 100_000, "NaN"):
        save_file({"x": torch.zeros(1)}, tmp_path / "f", {"kfac_factors": header})
        with pytest.raises(FactorsFileError, match="damaged header"):
            Factors.load(tmp_path / "f")


def test_factors_of_another_model(tmp_path, factors):
    path = tmp_path / "f.safetensors"
    factors.save(path)
    other = llama(torch.float32)
    with torch.no_grad():
        other.model.layers[0].mlp.gate_proj.weight[0, 0] += 1e-3
    with pytest.raises(FactorsMismatchError, match=r"layers\.0\.mlp\.gate_proj.*weights \(an edit"):
        Factors.load(path, model=other)
    with pytest.raises(FactorsMismatchError, match="other weights"):
        factors.check(llama(torch.float16))
    with pytest.raises(FactorsMismatchError, match="do not fit"):
        factors.check(build("gpt2"))
    other.model.layers[0].mlp.gate_proj = nn.Linear(16, 7)
    with pytest.raises(FactorsMismatchError, match="shape"):
        factors.check(other)


def test_eigen_is_cached_and_shared(factors):
    gate, up = factors.names[:2]
    one, two = factors.eigen(gate), factors.eigen(up)
    assert one.u_in is two.u_in
    assert one.u_out is factors.eigen(gate).u_out
    torch.testing.assert_close((one.u_in * one.mu) @ one.u_in.T, factors.A(gate))
    torch.testing.assert_close((one.u_out * one.lam) @ one.u_out.T, factors.G(gate))


def test_unknown_target(factors):
    for method in (factors.A, factors.G, factors.count, factors.eigen):
        with pytest.raises(TargetError, match="gate_proj"):
            method("nothing")
