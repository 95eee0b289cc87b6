import io
import re

import numpy as np
import pytest
from curvature_tools import batch, llama
from PIL import Image

import kfac
from kfac import BandRatios, Estimate, Relearning, figures
from kfac.factors import spectrum
from lirefs.errors import KeepError, SpectrumError, TargetError
from lirefs.pictures import SMALL, WIDE, picture_of


def ratios():
    table = np.stack([np.full((3, 4), v) for v in (1.0, 0.9, 1.1)])
    return BandRatios(["a", "b", "c"], ["top", "x", "y", "bottom"], table, table, (5, 6))


def estimates(*values):
    return [Estimate(v, v - 0.1, v + 0.1, 10) for v in values]


FIGURES = {
    "bands": (lambda: figures.bands_figure(ratios(), [20, 21, 22]), "n = 5 and 6 texts"),
    "bands without positions": (lambda: figures.bands_figure(ratios()), "target"),
    "task_curvature": (
        lambda: figures.task_curvature_figure(
            {"sums $x$": {"memorized": ratios(), "clean": ratios()}}
        ),
        "sums $x$",
    ),
    "detector": (
        lambda: figures.detector_figure(np.random.default_rng(0).random(30), np.arange(30) % 2),
        "memorized, n = 15",
    ),
    "relearning": (
        lambda: figures.relearning_figure(
            Relearning([0, 5], {"a": estimates(0.2, 0.3)}, {"a": estimates(0.5, 0.6)})
        ),
        "texts not trained on, n = 10",
    ),
    "pareto": (
        lambda: figures.pareto_figure(
            {"K-FAC": [tuple(estimates(12, 0.2)), tuple(estimates(10, 0.5))]},
            "perplexity",
            "recited",
            tuple(estimates(9, 0.9)),
        ),
        "unchanged",
    ),
}


@pytest.mark.parametrize("name", FIGURES)
def test_every_figure_fits_the_page_and_says_what_it_shows(name):
    make, text = FIGURES[name]
    picture = make()
    with Image.open(io.BytesIO(picture.png)) as image:
        assert image.format == "PNG"
        assert image.width <= WIDE * 220
    assert text in picture.svg.decode()


def test_no_task_is_refused():
    with pytest.raises(SpectrumError, match="no task"):
        figures.task_curvature_figure({})


def test_spectra_are_the_same_bytes_and_readable():
    values = np.geomspace(1, 1e-6, 40)
    curve = np.stack([np.geomspace(1e-4, 1, 9), np.linspace(0.1, 1, 9)], axis=1)
    spectra = [
        figures.Spectrum(f"layers.{i}.up", values, values, values * 40, curve, 0.9)
        for i in range(9)
    ]
    picture = figures.curvature_spectrum_figure(spectra)
    assert picture == figures.curvature_spectrum_figure(spectra)
    svg = picture.svg.decode()
    assert picture.png.startswith(b"\x89PNG")
    assert "layers.4.up" in svg  # text is text
    assert float(re.search(r'width="([\d.]+)pt"', svg).group(1)) <= 72 * WIDE + 1e-6
    sizes = [float(one) for one in re.findall(r"font(?:-size)?: ([\d.]+)px", svg)]
    assert min(sizes) >= SMALL


def test_names_in_a_legend_keep_what_differs():
    assert spectrum._apart(["a.0.up", "a.1.up"]) == ["0", "1"]
    assert spectrum._apart(["a.0.up", "a.1.down"]) == ["0.up", "1.down"]
    assert spectrum._apart(["a.0.up"]) == ["a.0.up"]
    assert spectrum._apart(["a", "a.b"]) == ["a", "a.b"]


@pytest.fixture(scope="module")
def factors():
    model = llama()
    return kfac.collect(model, [batch([0, 1, 2])], kfac.find_targets(model), progress=False)


def test_factors_plot_themselves(factors):
    name = factors.names[1]
    left, right, _ = factors.plot([name], keep=0.9).axes
    eigen = factors.eigen(name)
    stairs = kfac.staircase(eigen.lam, eigen.mu, 0.9)
    dot = next(one for one in left.lines if one.get_marker() == "o")
    assert dot.get_xydata().tolist() == [[stairs.pairs / stairs.total_pairs, 0.9]]
    assert right.get_title() == name
    every = factors.plot()
    assert len(every.axes[0].get_legend().get_texts()) == len(factors.names)
    assert picture_of(factors.plot()) == picture_of(every)
    with pytest.raises(TargetError, match="no factors for target 'x'"):
        factors.plot(["x"])
    with pytest.raises(TargetError, match="no target"):
        factors.plot([])
    with pytest.raises(KeepError):
        factors.plot(keep=2)


def test_factors_as_a_data_frame(factors):
    frame = factors.to_dataframe().set_index("target")
    assert list(frame.index) == factors.names
    for name, row in frame.iterrows():
        assert row["trace_A"] == pytest.approx(float(factors.A(name).trace()))
        assert row["trace_G"] == pytest.approx(float(factors.eigen(name).lam.sum()))
        assert row["count"] == factors.count(name)
