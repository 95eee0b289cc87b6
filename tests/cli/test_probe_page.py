"""The page of `lirefs probe`: what it says, and how it looks on a telephone."""

from dataclasses import replace

import numpy as np
import pytest
from browser import BROWSER, seen_in_frame
from steering_tools import split
from tiny import tiny_model, tiny_tokenizer

from lirefs import fit, wrap
from lirefs.cli.probe_page import probe_page, verdict
from lirefs.directions import figures, geometry
from lirefs.statistics.intervals import Estimate

LOOK = """
parent.postMessage(JSON.stringify({
  inside: document.documentElement.scrollWidth <= window.innerWidth,
  pictures: [...document.querySelectorAll("img")]
    .every((one) => one.getBoundingClientRect().right <= window.innerWidth),
  paper: getComputedStyle(document.body).backgroundColor,
}), "*");
"""


@pytest.fixture(scope="module")
def probe():
    lm = wrap(tiny_model("llama"), tiny_tokenizer(), name="tiny")
    return fit(lm, split(), shuffles=8, progress=False)


@pytest.fixture(scope="module")
def text(probe):
    pictures = {
        "layers": figures.probe_by_layer(probe),
        "best_layer": figures.best_layer_figure({"mean": probe}),
        "cosines": figures.cosine_maps({"own": geometry.cosines(probe.directions)}),
    }
    run = {"date": "2026-11-30 01:02", "command": "lirefs probe"}
    return probe_page("tiny", "mine.jsonl", probe, pictures, run)


def test_the_verdict_names_classes_and_every_control(probe):
    found = verdict(probe)
    assert f"separate {probe.names[0]} from" in found[0].replace("separates", "separate")
    assert f"p = {probe.p_value:.3f}" in found[0]
    assert f"{probe.shuffled:.2f}" in found[1]
    assert f"{probe.best_scores.random_auroc:.2f}" in found[2]
    assert f"{probe.bag_of_words:.2f}" in found[3]


def test_the_page_says_when_and_how_it_was_made_and_what_is_undefined(probe, text):
    assert "<strong>2026-11-30 01:02</strong>" in text
    assert "<code>lirefs probe</code>" in text
    assert "<h1>Directions of tiny</h1>" in text
    nothing = Estimate(float("nan"), -1.0, 1.0, 9)
    first, *others = probe.scores
    undefined = replace(probe, scores=(replace(first, spearman=nothing), *others))
    page = probe_page("tiny", "mine", undefined, {}, {})
    assert '<td class="number">n/a</td>' in page
    assert "n/a: all states" in page
    assert ">nan" not in page


def test_figures_leave_out_what_is_undefined(probe, monkeypatch):
    canvases = []
    monkeypatch.setattr(figures, "picture_of", canvases.append)
    nothing = Estimate(float("nan"), -1.0, 1.0, 9)
    first, *others = probe.scores
    undefined = replace(probe, scores=(replace(first, spearman=nothing), *others))
    figures.probe_by_layer(undefined)
    band = canvases[0].axes[1].collections[0].get_paths()
    assert min(one.vertices[:, 0].min() for one in band) >= 1
    figures.cosine_maps({"own": np.array([[0.0, 0.0], [0.0, 1.0]])})
    assert [one.get_text() for one in canvases[1].axes[0].texts] == ["n/a", "n/a", "n/a", "1.00"]
    figures.best_layer_figure({"mean": probe})
    assert canvases[2].axes[0].get_xlim()[1] < 1.05


@pytest.mark.skipif(BROWSER is None, reason="needs chromium or google-chrome")
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_fits_on_a_telephone(text, tmp_path, scheme):
    allowed = text.replace("default-src 'none';", "default-src 'none'; script-src 'unsafe-inline';")
    look = seen_in_frame(allowed, LOOK, tmp_path, 390, scheme)
    assert look["inside"]
    assert look["pictures"]
    assert (look["paper"] == "rgb(255, 255, 255)") == (scheme == "light")
