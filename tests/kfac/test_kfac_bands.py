import numpy as np
import pytest
import torch
from curvature_tools import assert_restored, batch, collect, llama, snapshot

import kfac
from kfac.collection.target_inputs import target_inputs
from lirefs.errors import (
    BatchError,
    FactorsMismatchError,
    NonFiniteError,
    SettingError,
    SpectrumError,
)


@pytest.fixture(scope="module")
def model():
    return llama(torch.float32)


@pytest.fixture(scope="module")
def factors(model):
    return collect(model, [batch(range(6))], kfac.find_targets(model, projections="mlp"))


def inputs_of(model, factors, rows):
    names = kfac.analysis.bands.distinct_inputs(factors)
    read, real = next(target_inputs(model, [batch(rows)], factors.targets(model, names)))
    return names, read, real


def test_distinct_inputs_are_read_once(model, factors):
    names, read, real = inputs_of(model, factors, [0, 1])
    # gate and up share their input; down has its own
    assert [name.rsplit(".")[-1] for name in names] == ["gate_proj", "down_proj"] * 2
    assert all(states.shape[:2] == real.shape for states in read.values())


def test_profile_is_the_mean_norm_of_the_projections(model, factors):
    before = snapshot(model)
    profile = kfac.band_profile(model, [batch([0, 1]), batch([2])], factors)
    assert_restored(model, before)
    assert len(profile) == 3
    assert profile.labels == ["top 10 %", "10-25 %", "25-50 %", "bottom 50 %"]
    names, read, real = inputs_of(model, factors, [0, 1])
    for index, name in enumerate(names):
        states = read[name][1][real[1]].double()  # the second text, four tokens
        c = states @ factors.eigen(name).u_in
        width = c.shape[1]
        cuts = [0, round(0.1 * width), round(0.25 * width), round(0.5 * width), width]
        for band in range(4):
            norms = c[:, cuts[band] : cuts[band + 1]].norm(dim=1)
            assert profile.norms[1, index, band] == pytest.approx(float(norms.mean()), rel=1e-4)
            unit = norms / states.norm(dim=1)
            assert profile.unit_norms[1, index, band] == pytest.approx(float(unit.mean()), rel=1e-4)


def test_padding_and_batching_change_nothing(model, factors):
    one = kfac.band_profile(model, [batch([0, 1, 2])], factors)
    two = kfac.band_profile(model, [batch([0]), batch([1, 2], side="left", extra=3)], factors)
    np.testing.assert_allclose(one.norms, two.norms, rtol=1e-3)
    np.testing.assert_allclose(one.unit_norms, two.unit_norms, rtol=1e-3)


def made_profile(scale, n=40, seed=0):
    generator = np.random.default_rng(seed)
    norms = np.array(scale) * (1 + 0.1 * generator.standard_normal((n, 1, len(scale))))
    return kfac.BandProfile(["x"], ["a", "b"], norms, norms / 2, np.full(n, 5.0))


def test_ratios_recover_a_known_difference():
    ratios = kfac.band_ratios(made_profile([2.0, 3.0]), made_profile([1.0, 6.0], seed=1))
    value, low, high = ratios.ratio[:, 0]
    np.testing.assert_allclose(value, [2, 0.5], rtol=0.1)
    assert (low < [2, 0.5]).all()
    assert (high > [2, 0.5]).all()
    assert (high - low < 0.2 * value).all()
    assert ratios.n == (40, 40)
    np.testing.assert_allclose(ratios.control, ratios.ratio)


def test_the_control_does_not_see_a_common_scale(model, factors):
    """Inputs that are larger as a whole change the raw ratio only."""
    clean = kfac.band_profile(model, [batch(range(6))], factors)
    louder = kfac.BandProfile(
        clean.names, clean.labels, 3 * clean.norms, clean.unit_norms, clean.tokens
    )
    ratios = kfac.band_ratios(louder, clean, resamples=50)
    np.testing.assert_allclose(ratios.ratio[0], 3)
    np.testing.assert_allclose(ratios.control[0], 1)


def test_task_ratios(model, factors):
    profiles = [kfac.band_profile(model, [batch([i, i + 1])], factors) for i in (0, 2, 4)]
    table = kfac.task_band_ratios(
        {"sums": profiles[0]}, {"memorized": profiles[1], "clean": profiles[2]}, resamples=20
    )
    direct = kfac.band_ratios(profiles[1], profiles[0], resamples=20)
    np.testing.assert_array_equal(table["sums"]["memorized"].ratio, direct.ratio)


def test_detector_scores_are_the_flat_share(model, factors):
    before = snapshot(model)
    scores = kfac.flat_shares(model, [batch([0, 1]), batch([2])], factors, flat=0.5)
    assert_restored(model, before)
    names, read, real = inputs_of(model, factors, [0, 1])
    assert scores.names == names
    assert [len(one) for one in scores.tokens] == [9, 4, 7]
    shares = []
    for name in names:
        states = read[name][1][real[1]].double()
        c = (states @ factors.eigen(name).u_in).square()
        sharp = c.shape[1] - round(0.5 * c.shape[1])
        shares.append((c[:, sharp:].sum(1) / c.sum(1)).numpy())
    np.testing.assert_allclose(scores.tokens[1], np.mean(shares, axis=0), rtol=1e-4)
    np.testing.assert_allclose(scores.by_target[1], np.mean(shares, axis=1), rtol=1e-4)
    assert scores.passages[1] == pytest.approx(np.mean(shares), rel=1e-4)


def test_autocast_does_not_round_a_projection():
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(2, 5, 16, generator=generator)
    basis = torch.linalg.qr(torch.randn(16, 16, generator=generator))[0]

    def measure():
        squares = kfac.analysis.bands.squared_coordinates(states, basis)
        sums = kfac.analysis.bands._band_sums(squares, torch.ones(2, 5, dtype=torch.bool), [4, 8])
        return torch.cat(
            [torch.cat(sums).flatten(), kfac.analysis.detector._flat_share(squares, 8)[0]]
        )

    outside = measure()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(measure(), outside)


def test_texts_unlike_the_factors_data_score_higher(model):
    """Factors of one kind of text: texts of another kind lie in its flat directions."""
    low = torch.randint(5, 12, (24, 8), generator=torch.Generator().manual_seed(0))
    high = torch.randint(30, 45, (12, 8), generator=torch.Generator().manual_seed(1))
    factors = collect(model, [{"input_ids": low[:12]}])
    scores = kfac.flat_shares(
        model, [{"input_ids": low[12:]}, {"input_ids": high}], factors, flat=0.6
    )
    area = kfac.auroc(scores.passages, [0] * 12 + [1] * 12)
    assert area.value > 0.9
    assert area.low <= area.value <= area.high


def test_auroc_against_counting_pairs():
    generator = np.random.default_rng(0)
    scores = generator.integers(0, 5, 60)
    labels = generator.integers(0, 2, 60)
    wins = [(a > b) + 0.5 * (a == b) for a in scores[labels == 1] for b in scores[labels == 0]]
    area = kfac.auroc(scores, labels)
    assert area.value == pytest.approx(np.mean(wins))
    assert 0.05 < area.high - area.low < 0.4
    for wrong in (([1.0, 2.0], [1, 1]), ([1.0], [1, 0]), ([np.nan, 1.0], [0, 1])):
        with pytest.raises(SettingError):
            kfac.auroc(*wrong)


def test_named_errors(model, factors):
    for use in (kfac.band_profile, kfac.flat_shares):
        with pytest.raises(BatchError, match="empty"):
            use(model, [], factors)
        with pytest.raises(BatchError):
            use(model, [torch.zeros(1, 3)], factors)
        with pytest.raises(FactorsMismatchError):
            use(llama(torch.bfloat16), [batch([0])], factors)
    for edges in ((), (0.5, 0.2), (0.0,), (1.0,), (0.001,)):
        with pytest.raises(SpectrumError, match="edges"):
            kfac.band_profile(model, [batch([0])], factors, edges=edges)
    for flat in (0, 1, -1, 2):
        with pytest.raises(SpectrumError, match="flat"):
            kfac.flat_shares(model, [batch([0])], factors, flat=flat)
    one = made_profile([1.0, 2.0])
    two = kfac.BandProfile(["y"], ["a", "b"], one.norms, one.norms, one.tokens)
    with pytest.raises(SpectrumError, match="different targets"):
        kfac.band_ratios(one, two)


MALFORMED = {
    "one text without a batch": {"input_ids": torch.tensor([5, 6, 7])},
    "a batch without a text": {"input_ids": torch.zeros(0, 3, dtype=torch.long)},
    "ids that are not integers": {"input_ids": torch.zeros(1, 3)},
    "an id past the vocabulary": {"input_ids": torch.tensor([[5, 50]])},
    "a mask of another shape": {
        "input_ids": torch.tensor([[5, 6]]),
        "attention_mask": torch.ones(1, 3, dtype=torch.long),
    },
    "labels of another shape": {
        "input_ids": torch.tensor([[5, 6]]),
        "labels": torch.ones(1, 3, dtype=torch.long),
    },
}


@pytest.mark.parametrize("kind", MALFORMED)
def test_malformed_batches_are_refused_by_name(model, factors, kind):
    uses = (
        lambda one: kfac.band_profile(model, [one], factors),
        lambda one: kfac.flat_shares(model, [one], factors),
        lambda one: kfac.teacher_forced_matches(model, [one]),
        lambda one: kfac.analysis.losses.position_losses(model, one),
        lambda one: collect(model, [one]),
    )
    for use in uses:
        with pytest.raises(BatchError, match="batch"):
            use(MALFORMED[kind])


@pytest.mark.parametrize("label", [50, -1])
def test_labels_outside_the_vocabulary_are_refused(model, label):
    one = batch([0]) | {"labels": batch([0])["input_ids"].clone()}
    one["labels"][0, 3] = label
    with pytest.raises(BatchError, match="vocabulary of 50"):
        collect(model, [one], labels="data")


def test_weights_that_are_nan_are_an_error():
    broken = llama(torch.float32)
    with torch.no_grad():
        broken.model.layers[0].self_attn.o_proj.weight[0, 0] = float("nan")
    known = collect(llama(torch.float32), [batch([0, 1])])  # of its other weights, the same
    for use in (kfac.band_profile, kfac.flat_shares):
        with pytest.raises(NonFiniteError, match="gate_proj"):
            use(broken, [batch([0])], known)
    with pytest.raises(NonFiniteError, match="batch 0"):
        kfac.teacher_forced_matches(broken, [batch([0])])


def test_another_forward_says_which_tokens_are_measured(model, factors):
    """Hidden by the mask of `forward`, the last tokens of each text count for nothing."""
    whole = batch([0, 1])

    def forward(model, given):
        real = given["attention_mask"].bool()
        real[:, 3:] = False
        return model(**given).logits, real

    profile = kfac.band_profile(model, [whole], factors, forward=forward)
    cut = {key: value[:, :3] for key, value in whole.items()}
    assert profile.tokens.tolist() == [3, 3]
    np.testing.assert_allclose(
        profile.norms, kfac.band_profile(model, [cut], factors).norms, rtol=1e-4
    )
