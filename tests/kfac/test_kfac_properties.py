"""Properties of the numerics of kfac, on arrays that hypothesis makes up."""

import copy
import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

import kfac
from kfac import Target, auroc, eigenbasis, plan, staircase
from kfac.analysis.split_half import matrix_agreement
from kfac.collection.sampling import sample_labels
from kfac.edits.baselines import largest_of_smallest, random_pairs_table, random_rotation
from kfac.edits.selection import SHAPES, select_largest, select_separable

pytestmark = pytest.mark.timeout(120)
CPU = torch.device("cpu")

quick = settings(max_examples=150, deadline=None, derandomize=True)
few = settings(max_examples=50, deadline=None, derandomize=True)

keeps = st.floats(0, 1, exclude_min=True) | st.sampled_from([1e-300, 0.5, 1 - 2**-53, 1.0])
whole = st.integers(0, 6).map(float)
anything = st.floats(0, 1e300) | st.sampled_from([0.0, 5e-324, 1e-310, 1e-160, 0.1, 1.0, 3.0])


def spectra(values, size=7):
    return st.lists(values, min_size=1, max_size=size).map(lambda one: sorted(one, reverse=True))


def tables(values, dtypes=(torch.float32, torch.float64)):
    shapes = st.tuples(st.integers(1, 5), st.integers(1, 6))

    def table(shape, dtype):
        cells = st.lists(values, min_size=math.prod(shape), max_size=math.prod(shape))
        return cells.map(lambda one: torch.tensor(one, dtype=dtype).reshape(shape))

    return st.tuples(shapes, st.sampled_from(dtypes)).flatmap(lambda one: table(*one))


def scaled(values):
    """Take a power of two out, so that products neither over- nor underflow without need."""
    exponent = math.frexp(values[0])[1]
    return np.array([math.ldexp(value, -exponent) for value in values])


def fewest(scores, held, keep):
    """Take entries one by one, largest score first, until they hold enough; exact arithmetic."""
    order = np.argsort(-scores.ravel(), kind="stable")
    exact = [Fraction(float(value)) for value in held.ravel()]
    total, goal = sum(exact), Fraction(keep) * sum(exact)
    mask = np.zeros(scores.size, dtype=bool)
    running = Fraction(0)
    for place in order:
        if running >= goal:
            break
        running += exact[place]
        mask[place] = True
    return mask.reshape(scores.shape), total


def assert_fewest(mask, scores, held, keep):
    """The set is a beginning of the order, and one entry less would not hold enough."""
    order = np.argsort(-scores.ravel(), kind="stable")
    taken = mask.ravel()[order]
    count = int(taken.sum())
    assert taken[:count].all()
    exact = [Fraction(float(value)) for value in held.ravel()[order]]
    goal, slack = Fraction(keep) * sum(exact), Fraction(1e-12) * sum(exact)
    if keep < 1 and goal:
        assert sum(exact[:count]) >= goal - slack
        assert sum(exact[: count - 1]) < goal + slack
    else:
        assert count == (len(order) if keep == 1 else 0)


@quick
@given(spectra(whole), spectra(whole), st.integers(-300, 300), st.sampled_from([0.25, 0.5, 0.75]))
@example([1.0, 1.0, 0.0], [1.0, 1.0], 0, 0.5)
def test_staircase_is_the_fewest_largest_masses(lam, mu, exponent, keep):
    chosen = staircase(np.ldexp(lam, exponent), mu, keep)
    mass = np.outer(lam, mu)
    expected, total = fewest(mass, mass, keep)
    np.testing.assert_array_equal(chosen.mask(), expected)
    assert chosen.pairs == expected.sum()
    assert chosen.kept_mass >= keep
    assert chosen.total == float(total) * 2.0**exponent


@few
@given(spectra(anything, 5), spectra(anything, 5), keeps)
@example([1.0, 0.0], [1.0], 5e-324)  # the goal underflows, but there is mass
@example([4e8], [4e299], 1.0)  # the mass overflows, but not its kept share
@example([1e-200], [1e-200], 0.5)
def test_staircase_of_any_spectrum(lam, mu, keep):
    chosen = staircase(lam, mu, keep)
    mass = np.outer(scaled(lam), scaled(mu))
    assert_fewest(chosen.mask(), mass, mass, keep)
    assert (np.diff(chosen.counts) <= 0).all()
    assert 0 <= chosen.kept_mass <= 1
    rows, columns = chosen.mask().any(1).sum(), chosen.mask().any(0).sum()
    assert chosen.rank_bound <= min(rows, columns)


@quick
@given(spectra(anything, 12), spectra(anything, 12), keeps, keeps)
def test_a_larger_keep_contains_the_smaller_set(lam, mu, one, two):
    low, high = (staircase(lam, mu, keep).counts for keep in sorted([one, two]))
    assert (low <= high).all()


@quick
@given(tables(whole), st.sampled_from([0.25, 0.5, 0.75]), st.randoms(use_true_random=False))
def test_the_largest_entries_of_a_table(scores, keep, random):
    held = torch.tensor([float(random.randint(0, 5)) for _ in range(scores.numel())])
    held = held.reshape(scores.shape)
    for weights in (None, held):
        chosen = select_largest(scores, keep, weights)
        summed = scores if weights is None else weights
        expected, total = fewest(scores.numpy(), summed.numpy(), keep)
        if total:
            np.testing.assert_array_equal(chosen.table.numpy(), expected)
            inside = summed[chosen.table].double().sum()
            assert chosen.kept_mass == pytest.approx(float(inside) / float(total))


@quick
@given(tables(st.floats(0, 2.0**100, width=32)), keeps, keeps)
def test_the_largest_entries_of_any_table(scores, one, two):
    low, high = (select_largest(scores, keep).table for keep in sorted([one, two]))
    assert not bool((low & ~high).any())
    assert_fewest(low.numpy(), scores.double().numpy(), scores.double().numpy(), min(one, two))


@quick
@given(spectra(whole), spectra(whole), st.randoms(use_true_random=False), keeps)
def test_order_of_the_spectra_does_not_matter(lam, mu, random, keep):
    rows, columns = list(range(len(lam))), list(range(len(mu)))
    random.shuffle(rows)
    random.shuffle(columns)
    lam, mu = torch.tensor(lam), torch.tensor(mu)
    for shape in SHAPES:
        plain = select_separable(lam, mu, keep, shape)
        mixed = select_separable(lam[rows], mu[columns], keep, shape)
        assert (plain.pairs, plain.rank_bound) == (mixed.pairs, mixed.rank_bound)
        assert plain.kept_mass == mixed.kept_mass >= min(keep, 1) * (1 - 1e-12)
        # Ties may be broken otherwise, but equal masses are interchangeable.
        mass = torch.outer(lam, mu)
        mine, theirs = plain.mask(CPU), mixed.mask(CPU)
        assert int(mine.sum()) == int(theirs.sum()) == plain.pairs
        ours = mass[rows][:, columns][theirs]
        assert torch.equal(mass[mine].sort().values, ours.sort().values)


@quick
@given(spectra(anything), spectra(anything), keeps, st.sampled_from([-40, -1, 3, 40]))
def test_the_choice_knows_no_unit(lam, mu, keep, exponent):
    lam = [value for value in lam if 1e-250 < value < 1e250] or [1.0]  # scaling loses no bit
    counts = staircase(lam, mu, keep).counts
    np.testing.assert_array_equal(staircase(np.ldexp(lam, exponent), mu, keep).counts, counts)


@quick
@given(st.integers(1, 6), st.integers(1, 6), st.floats(0, 1), st.integers(0, 2**32))
def test_random_tables_have_exactly_as_many_pairs(rows, columns, share, seed):
    pairs = round(share * rows * columns)
    table = random_pairs_table(rows, columns, pairs, [seed])
    assert table.shape == (rows, columns)
    assert int(table.sum()) == pairs


@few
@given(st.integers(1, 8), st.integers(0, 2**32))
def test_random_rotations_are_orthogonal(size, seed):
    rotation = random_rotation(size, torch.Generator().manual_seed(seed))
    torch.testing.assert_close(rotation.T @ rotation, torch.eye(size), atol=1e-5, rtol=0)


scores = st.floats(-5, 5) | st.sampled_from([0.0, 1.0, math.inf, -math.inf])


@quick
@given(st.lists(scores, min_size=1, max_size=8), st.lists(scores, min_size=1, max_size=8))
def test_auroc_is_the_share_of_ordered_pairs(zeros, ones):
    pairs = [(a > b) + (a == b) / 2 for a in ones for b in zeros]
    labels = [0] * len(zeros) + [1] * len(ones)
    area = auroc(zeros + ones, labels, resamples=20)
    assert area.value == pytest.approx(sum(pairs) / len(pairs), rel=1e-12)
    assert 0 <= area.low <= area.high <= 1
    assert area.n == len(labels)
    other = auroc([-score for score in zeros + ones], labels, resamples=20)
    assert area.value + other.value == pytest.approx(1, rel=1e-12)


@few
@given(st.integers(1, 6), st.integers(1, 8), st.integers(-60, 60), st.integers(0, 2**32))
def test_eigenbases_rebuild_the_matrix(size, rank, exponent, seed):
    rows = torch.randn(rank, size, generator=torch.Generator().manual_seed(seed)).double()
    matrix = rows.T @ rows * 2.0**exponent
    values, vectors = eigenbasis(matrix)
    assert (values >= 0).all()
    assert (values.diff() <= 0).all()
    bound = 1e-12 * float(matrix.norm())
    torch.testing.assert_close((vectors * values) @ vectors.T, matrix, atol=bound, rtol=0)
    unit = torch.eye(size, dtype=torch.float64)
    torch.testing.assert_close(vectors.T @ vectors, unit, atol=1e-12, rtol=0)


@few
@given(st.integers(2, 7), st.integers(0, 2**32), st.lists(st.floats(0.01, 0.99), min_size=1))
def test_agreement_of_halves_is_a_share(size, seed, cuts):
    generator = torch.Generator().manual_seed(seed)
    one, two = (torch.randn(9, size, generator=generator).double() for _ in range(2))
    one, two = one.T @ one, two.T @ two
    same, other = (matrix_agreement(one, b, np.array(cuts)) for b in (one, two))
    np.testing.assert_allclose(same.overlap, 1, atol=1e-9)
    assert (other.overlap >= 0).all()
    assert (other.overlap <= 1).all()
    assert float(other.other.sum()) == pytest.approx(float(two.trace()))


@few
@given(st.lists(st.integers(0, 5), min_size=1, max_size=9), st.integers(0, 2**32), st.booleans())
def test_labels_follow_the_inverse_of_the_cumulative_sum(parts, seed, wide):
    parts = parts * 60 if wide else parts  # more classes than a block holds
    if not sum(parts):
        parts[0] = 1
    chances = torch.tensor([parts], dtype=torch.float64)
    uniforms = torch.rand(20, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    labels = sample_labels(chances.expand(20, -1), uniforms)
    goals = uniforms * sum(parts)
    assert torch.equal(labels, torch.searchsorted(chances[0].cumsum(0), goals, right=True))
    assert (chances[0][labels] > 0).all()


@quick
@given(st.lists(st.floats(0, 10), min_size=1, max_size=20), st.floats(0, 1))
def test_the_largest_of_the_smallest(values, share):
    count = max(1, round(share * len(values)))
    found = largest_of_smallest(torch.tensor(values, dtype=torch.float64), count)
    assert float(found) == sorted(values)[count - 1]


@few
@given(
    st.lists(st.tuples(st.integers(1, 9), st.sampled_from([None, 4, 7])), min_size=1, max_size=8),
    st.none() | st.integers(2000, 6000),
    st.booleans(),
)
def test_a_plan_holds_every_target_once(sizes, budget, diagonal):
    targets = []
    for number, (outs, shared) in enumerate(sizes):
        own = "gate_proj" if number % 2 == 0 else "up_proj"
        module = torch.nn.Linear(shared or 5, outs)
        targets.append(Target(f"layers.{number // 2}.{own}", module))
    layout = plan(targets, budget, diagonal=diagonal)
    planned = [target.name for group in layout.passes for target in group]
    assert sorted(planned) == sorted(target.name for target in targets)
    assert len(layout.passes) == len(layout.bytes)
    assert sum(layout.bytes) == layout.total == plan(targets, diagonal=diagonal).total
    assert budget is None or max(layout.bytes) <= budget


class Tokens(torch.nn.Module):
    """Reads (B, T, 6); its one matrix is the target."""

    def __init__(self):
        super().__init__()
        self.fc1 = torch.nn.Linear(6, 3)

    def forward(self, x):
        return self.fc1(x)


@few
@given(st.integers(0, 2**32), st.sets(st.integers(1, 5), min_size=1, max_size=4), st.integers(1, 4))
def test_bands_and_the_detector_divide_all_energy(seed, cuts, texts):
    torch.manual_seed(seed)
    model, x = Tokens(), torch.randn(texts, 1, 6)

    def forward(model, batch):
        return model(batch), torch.ones(batch.shape[:2], dtype=torch.bool)

    targets = kfac.find_targets(model, projections=["fc1"])
    factors = kfac.collect(model, [x], targets, forward=forward, progress=False)
    edges = [cut / 6 for cut in sorted(cuts)]
    bands = kfac.band_profile(model, [x], factors, edges=edges, forward=forward)
    assert bands.norms.shape == (texts, 1, len(edges) + 1) == bands.unit_norms.shape
    energy = (bands.norms[:, 0] ** 2).sum(1)
    np.testing.assert_allclose(energy, x[:, 0].double().square().sum(1), rtol=1e-4)
    np.testing.assert_allclose((bands.unit_norms[:, 0] ** 2).sum(1), 1, rtol=1e-4)
    ratio = kfac.band_ratios(bands, bands, resamples=10).ratio[0]
    np.testing.assert_allclose(ratio[bands.norms.sum(0) > 0], 1, rtol=1e-12)
    half = kfac.split_half(factors, copy.copy(factors), "fc1")
    np.testing.assert_allclose(half.input.overlap, 1, atol=1e-9)
