"""Properties of factors and edits, on models and sums that hypothesis makes up."""

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import nn

import kfac
from kfac import CurvatureEdit, Factors, TargetRecord
from lirefs.errors import EditError, EditOrderError, KfacError
from lirefs.model.weight_swap import originals_of

pytestmark = pytest.mark.timeout(120)
CPU = torch.device("cpu")

quick = settings(max_examples=60, deadline=None, derandomize=True)
few = settings(max_examples=25, deadline=None, derandomize=True)

seeds = st.integers(0, 2**32)
keeps = st.floats(0, 1, exclude_min=True) | st.sampled_from([1e-300, 0.5, 1 - 2**-53, 1.0])
dtypes = st.sampled_from([torch.float32, torch.float64])
sizes = st.integers(1, 5)


def moments(size, seed, dtype, rows=4):
    values = torch.randint(-3, 4, (rows, size), generator=torch.Generator().manual_seed(seed))
    return (values.T @ values).to(dtype)


def made_up(model, seed=0, dtype=torch.float32, count=4, scale=1.0, letters=()):
    """Factors of all Linears of a model, from whole numbers, so that sums are exact."""
    records, sums = {}, {}
    for number, target in enumerate(
        kfac.find_targets(model, projections=list("012"[: len(model)]))
    ):
        out, into = target.out_features, target.in_features
        name, digest = target.name, kfac.weight_digest(target.weight)
        records[name] = TargetRecord(out, into, count, name, digest)
        sums[f"A.{name}"] = moments(into, seed + number, dtype, count) * scale
        sums[f"G.{name}"] = moments(out, seed + number + 7, dtype, count)
        shapes = {"AW": (into, into), "GW": (out, out), "D": (out, into)}
        for letter in letters:
            sums[f"{letter}.{name}"] = moments(max(shapes[letter]), seed + 9, dtype, count)[
                : shapes[letter][0], : shapes[letter][1]
            ].abs()
    return Factors(records, sums, seeds=[seed], tokens=count)


def stack(widths, seed=0, dtype=torch.float32):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        layers = [nn.Linear(a, b, bias=False) for a, b in itertools.pairwise(widths)]
        model = nn.Sequential(*layers).to(dtype)
        for parameter in model.parameters():
            nn.init.normal_(parameter)  # again: in float64 these are not float32 numbers
        return model


def bits(model):
    return [p.detach().clone() for p in model.parameters()]


def same_bits(model, expected):
    return all(torch.equal(p, value) for p, value in zip(model.parameters(), expected))


widths = st.lists(sizes, min_size=2, max_size=4)


@quick
@given(widths, st.lists(st.integers(0, 3), min_size=3, max_size=3), dtypes)
def test_merging_is_commutative_and_associative(widths, counts, dtype):
    model = stack(widths)
    a, b, c = (made_up(model, 31 * i, dtype, n, letters=["D"]) for i, n in enumerate(counts))
    merge = kfac.merge
    for one, two in (
        (merge([merge([a, b]), c]), merge([a, merge([b, c])])),
        (merge([a, b]), merge([b, a])),
        (merge([a, b, c]), merge([merge([a, b]), c])),
    ):
        assert one.records == two.records
        assert one.tokens == two.tokens
        assert sorted(one.seeds) == sorted(two.seeds)
        assert one.sums.keys() == two.sums.keys()
        assert all(torch.equal(table, two.sums[key]) for key, table in one.sums.items())
    if a.tokens:
        rest = kfac.subtract(merge([a, b]), b)
        assert all(torch.equal(table, a.sums[key]) for key, table in rest.sums.items())


@quick
@given(widths, st.lists(st.floats(0.01, 100), min_size=2, max_size=2), st.integers(-8, 8))
def test_only_the_ratio_of_weights_matters(widths, weights, exponent):
    model = stack(widths)
    parts = [made_up(model, 3, torch.float64), made_up(model, 5, torch.float64, count=2)]
    one = kfac.merge(parts, weights)
    two = kfac.merge(parts, [2.0**exponent * weight for weight in weights])
    share = weights[0] / sum(weights)
    for name in one.names:
        assert torch.equal(one.A(name), two.A(name))
        mean = share * parts[0].A(name) + (1 - share) * parts[1].A(name)
        torch.testing.assert_close(one.A(name), mean, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("bad", [math.inf, math.nan, 0.0, -1.0])
def test_weights_are_positive_numbers(bad):
    part = made_up(stack([2, 2]))
    with pytest.raises(KfacError, match="positive"):
        kfac.merge([part, part], [bad, 1.0])


def labelled(model, batch):
    rows, labels = batch
    return model(rows), torch.ones(len(rows), dtype=torch.bool), labels


@few
@given(
    st.integers(1, 9),
    st.sets(st.integers(1, 8)),
    st.sets(st.integers(1, 8)),
    st.randoms(use_true_random=False),
    st.booleans(),
)
def test_any_split_of_the_data_gives_the_same_factors(n, batch_cuts, part_cuts, random, sampled):
    model = stack([3, 4, 5], dtype=torch.float64)
    generator = torch.Generator().manual_seed(n)
    rows = torch.randn(n, 3, generator=generator, dtype=torch.float64)
    labels = torch.randint(0, 5, (n,), generator=generator)
    targets = kfac.find_targets(model, projections=["0", "1"])

    def collect(order, cuts):
        edges = [0, *sorted(cut for cut in cuts if cut < len(order)), len(order)]
        picked = [order[a:b] for a, b in itertools.pairwise(edges)]
        batches = [(rows[one], labels[one]) for one in picked]
        options = {"dtype": torch.float64, "diagonal": True, "forward": labelled}
        way = "sampled" if sampled else "data"
        return kfac.collect(model, batches, targets, labels=way, progress=False, **options)

    whole = collect(list(range(n)), [])
    order = list(range(n))
    random.shuffle(order)
    edges = [0, *sorted(cut for cut in part_cuts if cut < n), n]
    parts = [collect(order[a:b], batch_cuts) for a, b in itertools.pairwise(edges)]
    merged = kfac.merge(parts)
    assert merged.tokens == whole.tokens == n
    for key, table in whole.sums.items():
        bound = 1e-12 * float(table.norm())
        torch.testing.assert_close(merged.sums[key], table, atol=bound, rtol=0)


names = st.text(min_size=1, max_size=6) | st.sampled_from(
    ["Schicht.Ä", "层.0", "values.A", "a/b", "E.x", ".", "\x00", "🙂", "\u2028"]
)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=4),
    lambda one: st.lists(one, max_size=2) | st.dictionaries(st.text(max_size=3), one, max_size=2),
    max_leaves=4,
)


@quick
@given(
    st.lists(names, min_size=1, max_size=3, unique=True),
    sizes,
    sizes,
    dtypes,
    st.sets(st.sampled_from(["AW", "D", "E"])),
    st.dictionaries(st.text(max_size=3), json_values, max_size=2),
    st.lists(st.integers(), max_size=2),
    seeds,
)
def test_a_file_gives_back_what_was_saved(
    tmp_path_factory, found, out, into, dtype, letters, provenance, numbers, seed
):
    sums = {f"A.{found[0]}": moments(into, seed, dtype)}
    bases = {}
    for number, name in enumerate(found):
        sums[f"G.{name}"] = moments(out, seed + number, dtype)
        if "AW" in letters:
            sums |= {f"AW.{name}": moments(into, 3, dtype), f"GW.{name}": moments(out, 4, dtype)}
        sums |= {f"{x}.{name}": torch.rand(into, out).T.to(dtype) for x in letters & {"D", "E"}}
    if "E" in letters:
        bases = {key: kfac.eigenbasis(sums[key]) for key in sums if key[:2] in ("A.", "G.")}
    records = {name: TargetRecord(out, into, 3, found[0], "0") for name in found}
    factors = Factors(
        records, sums, seeds=numbers, tokens=3, provenance=provenance, bases=bases, weighted=True
    )
    path = tmp_path_factory.mktemp("factors") / "f.safetensors"
    factors.save(path)
    loaded = Factors.load(path)
    assert loaded.digest == factors.digest
    assert loaded.names == found
    for field in ("records", "seeds", "tokens", "labels", "provenance", "weighted", "estimators"):
        assert getattr(loaded, field) == getattr(factors, field)
    assert loaded.sums.keys() == factors.sums.keys()
    for key, table in factors.sums.items():
        assert loaded.sums[key].dtype == dtype
        assert torch.equal(loaded.sums[key], table)
    for name in found:
        mine, theirs = factors.eigen(name), loaded.eigen(name)
        assert torch.equal(mine.lam, theirs.lam)
        assert torch.equal(mine.u_in, theirs.u_in)
    again = path.with_name("again")
    loaded.save(again)
    assert again.read_bytes() == path.read_bytes()


def edits(factors, keep):
    """One edit of each kind."""
    return {
        "kfac": CurvatureEdit(factors, keep),
        "diagonal": CurvatureEdit(factors, keep, estimator="diagonal"),
        "marginal": CurvatureEdit(factors, keep, estimator="marginal"),
        "output": CurvatureEdit(factors, keep, shape="output"),
        "saliency": CurvatureEdit(factors, keep, saliency=True),
        "random": kfac.RandomPairsEdit(factors, keep, 1),
        "rotation": kfac.RandomRotationEdit(factors, keep, 1),
        "union": kfac.UnionEdit(factors, factors, keep),
        "removal": kfac.RemovalEdit(factors, keep),
        "svd": kfac.SVDEdit(factors.names, keep),
        "magnitude": kfac.MagnitudeEdit(factors.names, keep),
    }


LETTERS = ["AW", "GW", "D"]


@few
@given(widths, seeds, dtypes)
def test_keep_one_changes_no_bit(widths, seed, dtype):
    model = stack(widths, seed, dtype)
    before = bits(model)
    places = [p.data_ptr() for p in model.parameters()]
    for edit in edits(made_up(model, seed, letters=LETTERS), 1).values():
        with edit.apply(model):
            assert same_bits(model, before)
            assert [p.data_ptr() for p in model.parameters()] == places


@few
@given(st.tuples(sizes, sizes), seeds, dtypes, keeps, keeps)
@example((1, 1), 0, torch.float32, 0.5, 0.5)  # to remove a half removes the only pair
def test_a_larger_keep_keeps_all_that_a_smaller_one_does(widths, seed, dtype, one, two):
    model = stack(widths, seed, dtype)
    factors = made_up(model, seed, letters=LETTERS)
    factors.sums["A.0"].diagonal().add_(1)  # some mass, whatever the seed
    factors.sums["G.0"].diagonal().add_(1)
    factors.sums["D.0"].add_(1)
    factors.sums["AW.0"].diagonal().add_(1)
    factors.sums["GW.0"].diagonal().add_(1)
    low, high = sorted([one, two])
    if high == 1:
        return
    coordinates = factors.coordinates("0", model[0].weight.detach(), "x")
    for kind, edit in edits(factors, low).items():
        if kind in ("svd", "random"):  # those keep no more than a number
            continue
        if kind == "magnitude":
            small, large = (edit.with_keep(k).prepare(model)[0][1] != 0 for k in (low, high))
        else:
            wider = edits(factors, high)[kind]
            try:
                small, large = (e.choose("0", coordinates).mask(CPU) for e in (edit, wider))
            except EditError:
                if kind == "removal":  # every pair would be removed
                    continue
                raise
        assert not bool((small & ~large).any()), kind
        assert bool(small.any()), kind
    random = kfac.RandomPairsEdit(factors, low, seed)
    assert random.choose("0", None).pairs == CurvatureEdit(factors, low).choose("0", None).pairs


@quick
@given(st.tuples(sizes, sizes), seeds, keeps, st.integers(-20, 20), st.integers(1, 9))
def test_neither_units_nor_counts_change_an_edit(widths, seed, keep, exponent, times):
    model = stack(widths, seed)
    plain = made_up(model, seed)
    scaled = made_up(model, seed, scale=2.0**exponent)
    # The same sums of other data: the factors themselves may be merged only once.
    repeated = kfac.merge(
        [
            kfac.Factors(plain.records, plain.sums, seeds=[part], tokens=plain.tokens)
            for part in range(times)
        ]
    )
    if not plain.sums["A.0"].any() or not plain.sums["G.0"].any():
        return
    expected = [weight for _, weight in CurvatureEdit(plain, keep).prepare(model)]
    for factors in (scaled, repeated):
        found = CurvatureEdit(factors, keep)
        assert found.report()[0].pairs == CurvatureEdit(plain, keep).report()[0].pairs
        for (_, weight), other in zip(found.prepare(model), expected, strict=True):
            torch.testing.assert_close(weight, other, atol=1e-5, rtol=1e-5)


@quick
@given(st.lists(st.tuples(st.booleans(), st.integers(0, 5)), max_size=12), seeds)
def test_any_order_of_attaching_and_removing_restores_every_bit(steps, seed):
    model = stack([3, 4, 3, 2], seed)
    before, places = bits(model), [p.data_ptr() for p in model.parameters()]
    subsets = [["0"], ["1"], ["2"], ["0", "1"], ["1", "2"], ["0", "2"]]
    attached = []  # the handles in place with their names and the weights before them

    def is_last(number):
        names = attached[number][1]
        return not any(set(names) & set(later[1]) for later in attached[number + 1 :])

    for attach, choice in steps:
        if attach:
            state = bits(model)
            edit = kfac.SVDEdit(subsets[choice], 0.4)
            attached.append((edit.attach(model), subsets[choice], state))
        elif attached:
            number = choice % len(attached)
            handle, names, state = attached[number]
            now = bits(model)
            if is_last(number):
                handle.remove()
                del attached[number]
                for name, weight, old in zip("012", model.parameters(), now):
                    expected = state[int(name)] if name in names else old
                    assert torch.equal(weight, expected)
            else:
                with pytest.raises(EditOrderError):
                    handle.remove()
                assert same_bits(model, now)
    for handle, _, _ in reversed(attached):
        handle.remove()
    assert same_bits(model, before)
    assert [p.data_ptr() for p in model.parameters()] == places
    assert not any(originals_of(p) for p in model.parameters())


@quick
@given(st.integers(1, 6), st.integers(1, 6), seeds, dtypes, st.floats(0, 1, exclude_min=True))
@example(4, 4, 0, torch.float64, 0.5)
@example(3, 3, 0, torch.float32, 1e-300)  # rounded up is never none
def test_magnitude_and_svd_keep_the_share_they_are_asked_for(out, into, seed, dtype, keep):
    model = stack([into, out], seed, dtype)
    weight = model[0].weight.detach().clone()
    with kfac.MagnitudeEdit(["0"], keep).apply(model):
        kept = model[0].weight.detach() != 0
    assert int(kept.sum()) == max(1, math.ceil(keep * weight.numel() - 1e-9))
    assert bool(
        (weight.abs()[kept].min() > weight.abs()[~kept].max())
        if kept.any() and not kept.all()
        else True
    )
    with kfac.SVDEdit(["0"], keep).apply(model):
        edited = model[0].weight.detach().double()
    rank = max(1, math.ceil(keep * min(out, into) - 1e-9))
    left, values, right = np.linalg.svd(weight.double().numpy(), full_matrices=False)
    expected = (left[:, :rank] * values[:rank]) @ right[:rank]
    np.testing.assert_allclose(edited.numpy(), expected, atol=1e-5)
