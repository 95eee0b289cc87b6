from dataclasses import replace

import numpy as np
import pytest
import torch
from steering_tools import split
from tiny import fresh_model, tiny_tokenizer

from lirefs import Direction, Directions, Questions, capture, fit, wrap
from lirefs.directions import figures as probe_plots
from lirefs.directions import geometry
from lirefs.errors import DirectionError, QuestionsError
from lirefs.pictures import picture_of


@pytest.fixture(scope="module")
def fitted():
    lm = wrap(fresh_model("llama"), tiny_tokenizer(), name="tiny")
    return lm, fit(lm, split(), shuffles=8, progress=False)


def test_cosines_between_layers_and_sets(fitted):
    _, probe = fitted
    own = geometry.cosines(probe.directions)
    assert own.shape == (4, 4)
    np.testing.assert_allclose(np.diag(own)[1:], 1, atol=1e-6)
    a, b = (probe.directions[layer].unit for layer in (1, 2))
    assert own[1, 2] == pytest.approx(float(a @ b), abs=1e-6)
    turned = Directions({place: -one for place, one in probe.directions.items()})
    opposite = geometry.cosines(probe.directions, turned)
    np.testing.assert_allclose(opposite, -own, atol=1e-6)
    narrow = Directions({(0, "resid_pre"): Direction(torch.ones(4), 0)})
    with pytest.raises(DirectionError, match="width"):
        geometry.cosines(probe.directions, narrow)


def test_transfer_scores_another_set_and_refuses_shared_questions(fitted):
    lm, probe = fitted
    other = Questions([*split(seed=5).train, *split(seed=5).test], "other")
    found = geometry.transfer(lm, probe.directions, other, split(), controls=9, progress=False)
    states = capture(lm, other.prompts, progress=False)[2].double()
    labels = torch.tensor(other.labels)
    along = states @ probe.directions[2].unit.double()
    pairs = along[labels == 1][:, None] > along[labels == 0][None]
    assert found.auroc[2].value == pytest.approx(float(pairs.double().mean()))
    assert all(one.low >= 0.5 for one in found.random)
    with pytest.raises(QuestionsError, match="were fitted on"):
        geometry.transfer(lm, probe.directions, split().train, split(), progress=False)


def test_principal_components_of_train_states(fitted):
    lm, probe = fitted
    found = geometry.components(lm, probe.best, split())
    assert found.points.shape == (12, 2)
    states = capture(lm, split().train.prompts, progress=False)[probe.best_layer].double()
    first = torch.linalg.svd(states - states.mean(0))[2][0]
    expected = abs(float(first @ probe.best.unit.double()))
    assert found.cosines[0] == pytest.approx(expected, abs=1e-6)
    assert 0 < found.random < 1


def test_every_figure_is_drawn(fitted):
    lm, probe = fitted
    other = Questions(list(split(seed=5).train), "other")
    moved = geometry.transfer(lm, probe.directions, other, split(), progress=False)
    figures = [
        probe_plots.probe_by_layer(probe),
        probe_plots.best_layer_figure({"mean": probe, "again": probe}),
        probe_plots.cosine_maps({"layers": geometry.cosines(probe.directions)}),
        probe_plots.projection_scatter(geometry.components(lm, probe.best, split()), probe),
        probe_plots.probes_side_by_side({"base": probe, "instruct": probe}),
        probe_plots.transfer_bars(probe, {"other": moved}),
    ]
    assert all(one.png.startswith(b"\x89PNG") and b"<svg" in one.svg for one in figures)


def test_a_probe_and_its_directions_plot_themselves(fitted):
    _, probe = fitted
    left, right = probe.plot().axes
    values = [one.test_auroc.value for one in probe.scores]
    assert list(left.lines[0].get_ydata()) == values
    assert [one.get_label() for one in right.lines[:2]] == ["reasoning", "memory"]
    for line, side in zip(right.lines, (1, 0), strict=False):
        assert list(line.get_ydata()) == [one.cosines[side] for one in probe.scores]
    assert probe_plots.direction_separation(probe) == picture_of(probe.plot())
    left, right, _ = probe.directions.plot().axes
    norms = [one.norm for one in probe.directions.values()]
    np.testing.assert_allclose(left.lines[0].get_ydata(), norms)
    np.testing.assert_allclose(right.images[0].get_array(), geometry.cosines(probe.directions),
                               atol=1e-6)  # fmt: skip


def test_directions_of_several_sites_are_told_apart(fitted):
    _, probe = fitted
    more = {
        (one.layer, "mlp_out"): replace(one, site="mlp_out") for one in probe.directions.values()
    }
    both = Directions({**probe.directions, **more})
    left, right, _ = both.plot().axes
    assert [one.get_label() for one in left.lines] == ["resid_pre", "mlp_out"]
    assert [one.get_text() for one in right.get_xticklabels()][-1] == "3 mlp_out"


def test_a_probe_as_a_data_frame(fitted):
    _, probe = fitted
    frame = probe.to_dataframe()
    assert list(frame["layer"]) == [one.layer for one in probe.scores]
    assert list(frame["test_auroc_low"]) == [one.test_auroc.low for one in probe.scores]
    assert list(frame["n"]) == [one.test_auroc.n for one in probe.scores]
    assert list(frame.loc[frame["best"], "layer"]) == [probe.best_layer]
    assert list(frame["norm"]) == [one.norm for one in probe.directions.values()]
