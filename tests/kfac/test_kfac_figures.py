import re

import numpy as np
import pytest

from kfac import BandRatios, Estimate, LossSlices, Relearning, SplitHalf
from kfac import figures as plots
from kfac.analysis.split_half import SideAgreement
from lirefs.pictures import SMALL, WIDE

PNG = b"\x89PNG\r\n\x1a\n"


def ratios():
    table = np.stack([np.full((3, 4), v) for v in (1.0, 0.9, 1.1)])
    return BandRatios(["a", "b", "c"], ["top", "x", "y", "bottom"], table, table, (5, 6))


def estimates(*values):
    return [Estimate(v, v - 0.1, v + 0.1, 10) for v in values]


def side(size=20):
    own = np.sort(np.random.default_rng(0).random(size))[::-1]
    cuts = np.array([0.1, 0.5])
    return SideAgreement(own, own * 0.9, cuts, np.array([0.9, 0.6]), 1 - cuts)


@pytest.mark.parametrize(
    "make",
    [
        lambda: plots.bands(ratios(), [20, 21, 22]),
        lambda: plots.bands(ratios()),
        lambda: plots.task_curvature({"sums": {"memorized": ratios(), "clean": ratios()}}),
        lambda: plots.detector(np.random.default_rng(0).random(30), np.arange(30) % 2),
        lambda: plots.slices(
            LossSlices(
                "w",
                np.zeros((4, 2), dtype=np.int64),
                np.ones(4),
                np.ones(4),
                np.array([0.1, -0.1]),
                np.ones((4, 2)),
                np.ones((4, 2)),
            )
        ),
        lambda: plots.reliability(SplitHalf("w", side(), side(30))),
        lambda: plots.relearning(
            Relearning([0, 5], {"a": estimates(0.2, 0.3)}, {"a": estimates(0.5, 0.6)})
        ),
        lambda: plots.pareto(
            {"K-FAC": [tuple(estimates(10, 0.5)), tuple(estimates(12, 0.2))]},
            "perplexity",
            "recited",
            tuple(estimates(9, 0.9)),
        ),
    ],
)
def test_every_figure_is_a_png(make):
    assert make().startswith(PNG)


def test_spectra_are_the_same_bytes_and_readable():
    values = np.geomspace(1, 1e-6, 40)
    curve = np.stack([np.geomspace(1e-4, 1, 9), np.linspace(0.1, 1, 9)], axis=1)
    spectra = [
        plots.Spectrum(f"layers.{i}.up", values, values, values * 40, curve, 0.9) for i in range(9)
    ]
    picture = plots.curvature_spectrum(spectra)
    assert picture == plots.curvature_spectrum(spectra)
    svg = picture.svg.decode()
    assert picture.png.startswith(PNG)
    assert "layers.4.up" in svg  # text is text
    assert float(re.search(r'width="([\d.]+)pt"', svg).group(1)) <= 72 * WIDE + 1e-6
    sizes = [float(one) for one in re.findall(r"font(?:-size)?: ([\d.]+)px", svg)]
    assert min(sizes) >= SMALL


def test_names_in_a_legend_keep_what_differs():
    assert plots._apart(["a.0.up", "a.1.up"]) == ["0", "1"]
    assert plots._apart(["a.0.up", "a.1.down"]) == ["0.up", "1.down"]
    assert plots._apart(["a.0.up"]) == ["a.0.up"]
    assert plots._apart(["a", "a.b"]) == ["a", "a.b"]
