"""Laws of operators, directions, splits and fits, for any numbers, names and labels."""

from __future__ import annotations

import itertools
import math
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays
from sklearn.base import clone

from lirefs import (
    Direction,
    Directions,
    LogisticDirection,
    MeanDifference,
    PCADirection,
    Question,
    Questions,
    RidgeDirection,
    WhitenedMeanDifference,
)
from lirefs.errors import QuestionsError
from lirefs.questions.question import LABELS
from lirefs.steering.operator_names import OPERATORS
from lirefs.steering.operators import Operator

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
NUMBERS = st.floats(-100, 100, width=32)
STRENGTHS = st.floats(-10, 10)


def law(examples):
    return settings(max_examples=examples, deadline=None, derandomize=True, database=None)


@st.composite
def states(draw):
    """Hidden states of any shape and dtype, and a direction of their width."""
    shape = draw(array_shapes(min_dims=1, max_dims=4, max_side=5))
    h = torch.from_numpy(draw(arrays(np.float32, shape, elements=NUMBERS)))
    d = torch.from_numpy(draw(arrays(np.float32, shape[-1:], elements=NUMBERS)))
    return h.to(draw(st.sampled_from(DTYPES))), d


def unit_of(d):
    exact = d.double()
    return exact / exact.norm() if exact.norm() > 0 else exact


def formula(name, h, d, a):
    """The operators written out, in float64."""
    h, v, d = h.double(), unit_of(d), d.double()
    along = (h @ v).unsqueeze(-1)
    moved = h + a * d
    length = moved.norm(dim=-1, keepdim=True)
    return {
        "add": moved,
        "ablate": h - along * v,
        "amplify": h + a * along * v,
        "clamp": h + (a - along) * v,
        "norm_preserving_add": moved * h.norm(dim=-1, keepdim=True) / length.clamp(min=1e-300),
        "ablate_then_add": h - along * v + a * d,
    }[name]


def close(found, expected, scale, dtype, factor=8.0):
    """Whether two tensors agree up to rounding at the given size of numbers."""
    eps = max(torch.finfo(dtype).eps, torch.finfo(torch.float64).eps)
    gap = (found.double() - expected.double()).abs()
    return bool((gap <= factor * eps * scale + torch.finfo(dtype).tiny).all())


def size(h, d, a=0.0):
    """The largest number that an operator meets at each token."""
    return h.double().norm(dim=-1, keepdim=True) + abs(a) * (1 + d.double().norm())


@law(150)
@given(states(), STRENGTHS, st.sampled_from(OPERATORS))
def test_operators_are_their_formulas(given_states, a, name):
    h, d = given_states
    if name == "norm_preserving_add":  # where h + a d nearly vanishes, its direction is noise
        left = (h.double() + a * d.double()).norm(dim=-1)
        assume(bool((left > 1e-3 * size(h, d, a).squeeze(-1)).all()))
    if name == "clamp":
        assume(bool(d.any()))
    found = Operator(name, d, a)(h)
    assert found.dtype == h.dtype
    assert found.shape == h.shape
    factor = 8e3 if name == "norm_preserving_add" else 8
    assert close(found, formula(name, h, d, a), size(h, d, a), h.dtype, factor)


@law(80)
@given(states())
def test_ablate_is_amplify_by_minus_one_and_removes_the_component(given_states):
    h, d = given_states
    found = Operator("ablate", d, 1.0)(h)
    assert torch.equal(found, Operator("amplify", d, -1.0)(h))
    left = (found.double() @ unit_of(d)).unsqueeze(-1)
    assert close(left, torch.zeros_like(left), size(h, d), h.dtype)


@law(80)
@given(states(), STRENGTHS)
def test_clamp_twice_is_clamp_once_and_add_is_undone(given_states, a):
    h, d = given_states
    clamp = Operator("clamp", d, a)
    once = clamp(h)
    assert close(clamp(once), once, size(h, d, a), h.dtype)
    there = Operator("add", d, a)(h)
    assert close(Operator("add", d, -a)(there), h, size(h, d, a), h.dtype)


@law(60)
@given(states(), st.data())
def test_a_strength_for_each_token_is_that_strength(given_states, data):
    h, d = given_states
    assume(h.dim() > 1)
    strengths = data.draw(
        arrays(np.float32, h.shape[:-1], elements=st.floats(-10, 10, width=32)), "strengths"
    )
    name = data.draw(st.sampled_from([one for one in OPERATORS if one != "ablate"]), "operator")
    together = Operator(name, d, 1.0)(h, torch.from_numpy(strengths).unsqueeze(-1))
    for token in itertools.product(*map(range, strengths.shape)):
        alone = Operator(name, d, float(strengths[token]))(h[token])
        scale = size(h[token], d, float(strengths[token]))
        assert close(together[token], alone, scale, h.dtype)


# Directions: a vector space at each layer and site.


@st.composite
def vectors(draw, count):
    width = draw(st.integers(1, 6))
    elements = st.floats(-1e3, 1e3, width=32).filter(lambda x: x == 0 or abs(x) > 1e-20)
    return [
        Direction(
            torch.from_numpy(draw(arrays(np.float32, width, elements=elements))),
            layer=3,
            means=(draw(NUMBERS), draw(NUMBERS)),
            spread=(1.0, 2.0),
            counts=(4, 5),
        )
        for _ in range(count)
    ]


def same(one, other, scale=None):
    scale = one.norm + other.norm if scale is None else scale
    return close(one.vector, other.vector, scale, torch.float32)


FACTORS = st.floats(-50, 50).filter(lambda k: abs(k) > 1e-2)


@law(100)
@given(vectors(3), FACTORS, FACTORS)
def test_directions_are_a_vector_space(abc, j, k):
    a, b, c = abc
    scale = (1 + abs(j)) * (1 + abs(k)) * (a.norm + b.norm + c.norm)
    assert torch.equal((a + b).vector, (b + a).vector)
    assert same((a + b) + c, a + (b + c), scale)
    assert same((a + b) - b, a, scale)
    assert torch.equal((a - b).vector, (-(b - a)).vector)
    assert torch.equal((a - a).vector, (a * 0).vector)
    assert torch.equal((a + a).vector, (a * 2).vector)
    assert same((a + b) * k, a * k + b * k, scale)
    assert same((a * j) * k, a * (j * k), scale)
    assert torch.equal((k * a).vector, (a * k).vector)
    assert same(a / k * k, a, scale)
    assert same(Direction.mean_of([a, b, c]) * 3, a + b + c, scale)
    turned = -a
    mirrored = -turned
    assert torch.equal(mirrored.vector, a.vector)
    assert mirrored.means == a.means


@law(100)
@given(vectors(2), FACTORS, st.integers(0, 2**31))
def test_what_was_measured_follows_the_unit_vector(ab, k, seed):
    a, b = ab
    # `means` are projections on the unit vector, which a factor keeps or reverses.
    scaled = a * k
    assert scaled.means == tuple(math.copysign(1.0, k) * one for one in a.means)
    assert (scaled.spread, scaled.counts) == (a.spread, a.counts)
    if a.norm > 0:
        turned = math.copysign(1.0, k) * a.unit
        assert close(scaled.unit, turned, torch.tensor(1.0), torch.float32)
        assert a.normalized().norm == pytest.approx(1.0, abs=1e-6)
        assert a.normalized().means == a.means
    assert a.random_like(seed).norm == pytest.approx(a.norm, rel=1e-5)
    left = a.project_off(b)
    assert abs(float(left.vector.double() @ unit_of(b.vector))) <= 1e-6 * a.norm
    assert same(left.project_off(b), left, a.norm)


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**53), 2**53)
    | st.floats(allow_nan=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=5,
)
NAMES = st.text(st.characters(codec="utf-8"), max_size=8)


@law(60)
@given(
    st.dictionaries(st.tuples(st.integers(0, 200), NAMES), st.integers(0, 99), min_size=1),
    st.dictionaries(st.text(), JSON, max_size=4),
)
@example({(0, "__metadata__"): 0, (1, "1.resid_pre"): 0, (11, ".resid_pre"): 0}, {"model": 5})
def test_whatever_is_saved_is_loaded(places, provenance):
    generator = torch.Generator().manual_seed(0)
    directions = Directions(
        {
            (layer, site): Direction(
                torch.randn(5, generator=generator),
                layer,
                site,
                means=(0.1 * n, -n / 3),
                spread=(n / 7, 1e-300),
                counts=(n, 2**40),
            )
            for (layer, site), n in places.items()
        },
        provenance,
    )
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "directions.safetensors"
        directions.save(file)
        found = Directions.load(file)
    assert list(found) == list(directions)
    assert found.provenance == directions.provenance
    for place, one in directions.items():
        assert torch.equal(found[place].vector, one.vector)
        for field in ("layer", "site", "means", "spread", "counts", "model"):
            assert getattr(found[place], field) == getattr(one, field)


# Splits.

TEXTS = st.text("ab+ .,A", min_size=1, max_size=4)


@law(150)
@given(
    st.lists(st.tuples(TEXTS, st.sampled_from(LABELS)), min_size=1, max_size=40),
    st.floats(allow_nan=True),
    st.floats(0, 1),
    st.integers(),
)
@example([(f"{'a' * n}", LABELS[n % 2]) for n in range(1, 13)], 0.5, 0.25, 0)
def test_a_split_loses_nothing_and_shares_nothing(rows, train, validation, seed):
    try:
        questions = Questions(
            [Question(text, label, str(i)) for i, (text, label) in enumerate(rows)]
        )
        split = questions.split(train, validation, seed)
    except QuestionsError:
        return
    keys = {name: {item.key for item in side} for name, side in split.sides.items()}
    for one, other in itertools.combinations(keys.values(), 2):
        assert not one & other
    assert sorted(item.id for side in split.sides.values() for item in side) == sorted(
        item.id for item in questions
    )
    assert all(set(side.labels) == {0, 1} for side in split.sides.values())


@law(60)
@given(
    st.lists(st.integers(0, 30), min_size=8, max_size=60),
    st.floats(0.05, 0.9),
    st.floats(0.05, 0.9),
    st.integers(0, 5),
)
def test_shares_are_kept_whatever_is_asked_twice(repeats, train, validation, seed):
    """Of n different questions of a label, each side gets its share, up to rounding."""
    assume(train + validation < 0.95)
    texts = [f"{label} {'x' * n}" for label in LABELS for n in range(15)]
    rows = [(text, text.split()[0]) for text in texts]
    rows += [(texts[n % len(texts)].upper(), texts[n % len(texts)].split()[0]) for n in repeats]
    questions = Questions([Question(text, label, str(i)) for i, (text, label) in enumerate(rows)])
    try:
        split = questions.split(train, validation, seed)
    except QuestionsError:  # a side too small for one of each label
        assert min(train, validation, 1 - train - validation) * 15 <= 1.0
        return
    for name, share in (("train", train), ("validation", validation)):
        for label in LABELS:
            found = {item.key for item in split.sides[name] if item.label == label}
            assert abs(len(found) - share * 15) <= 1.0
    again = questions.split(train, validation, seed)
    assert [item.id for item in again.test] == [item.id for item in split.test]


# Estimators: how directions follow data that is scaled, shifted, reordered or relabelled.

CLASSIFIERS = [
    MeanDifference(),
    WhitenedMeanDifference(),
    WhitenedMeanDifference(0.3),
    LogisticDirection(),
    PCADirection(),
]
ESTIMATORS = [*CLASSIFIERS, RidgeDirection()]


@st.composite
def samples(draw):
    half, width = draw(st.integers(3, 12)), draw(st.integers(1, 8))
    generator = np.random.default_rng(draw(st.integers(0, 2**32)))
    X = generator.normal(size=(2 * half, width)) * np.geomspace(1, draw(st.floats(1, 30)), width)
    y = np.arange(2 * half) % 2
    X[y == 1] += generator.normal(size=width) * draw(st.floats(0.5, 3))
    return X, y


def assert_vectors(found, expected):
    scale = np.linalg.norm(expected) + np.linalg.norm(found)
    assert np.linalg.norm(found - expected) <= 2e-4 * scale  # tolerance of the solvers


@pytest.mark.parametrize("estimator", ESTIMATORS, ids=repr)
@law(15)
@given(samples(), st.floats(-3, 3), st.floats(-1e2, 1e2), st.randoms(use_true_random=False))
def test_a_direction_follows_its_samples(estimator, data, exponent, shift, random):
    X, y = data
    plain = clone(estimator).fit(X, y)
    factor = 10.0**exponent
    order = list(range(X.shape[1]))
    random.shuffle(order)
    cases = {
        "scaled": (X * factor, plain.direction_ * factor),
        "shifted": (X + shift, plain.direction_),
        "features reordered": (X[:, order], plain.direction_[order]),
        "mirrored": (-X, -plain.direction_),
    }
    for changed, expected in cases.values():
        other = clone(estimator).fit(changed, y)
        assert_vectors(other.direction_, expected)
        found, wanted = other.predict(changed), plain.predict(X)
        assert np.isclose(found, wanted, atol=1e-6).mean() > 0.8  # some lie on the boundary


@pytest.mark.parametrize("estimator", ESTIMATORS, ids=repr)
@law(15)
@given(samples(), st.randoms(use_true_random=False))
def test_a_direction_follows_its_labels(estimator, data, random):
    X, y = data
    plain = clone(estimator).fit(X, y)
    assert_vectors(clone(estimator).fit(X, 1 - y).direction_, -plain.direction_)
    pairs = list(range(len(y) // 2))
    random.shuffle(pairs)  # the k-th sample of one class stays with the k-th of the other
    order = np.array([2 * k + side for k in pairs for side in (0, 1)])
    assert_vectors(clone(estimator).fit(X[order], y[order]).direction_, plain.direction_)
    if estimator in CLASSIFIERS:
        named = clone(estimator).fit(X, np.array(["memory", "reasoning"])[y])
        assert np.array_equal(named.direction_, plain.direction_)
        gap = plain.means_[1] - plain.means_[0]
        # Its length is the gap between the class means along it.
        along = plain.direction_ @ gap / max(np.linalg.norm(plain.direction_), 1e-300)
        assert abs(along) == pytest.approx(np.linalg.norm(plain.direction_), rel=1e-6)
    if not isinstance(estimator, PCADirection):  # which pairs samples by order
        mixed = list(range(len(y)))
        random.shuffle(mixed)
        assert_vectors(clone(estimator).fit(X[mixed], y[mixed]).direction_, plain.direction_)


@law(25)
@given(samples(), st.data())
def test_sums_do_not_depend_on_the_batches(data, drawn):
    X, y = data
    cuts = drawn.draw(st.lists(st.integers(0, len(y)), max_size=4), "cuts")
    edges = [0, *sorted(cuts), len(y)]
    part = MeanDifference()
    for begin, end in itertools.pairwise(edges):
        if end > begin:
            part.partial_fit(X[begin:end], y[begin:end], classes=[0, 1])
    whole = MeanDifference().fit(X, y)
    assert_vectors(part.direction_, whole.direction_)
    assert np.array_equal(part.counts_, whole.counts_)
