"""The curvature spectrum of targets as a figure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from kfac.edits.staircase import staircase
from lirefs.pictures import (
    COLOURS,
    WIDE,
    canvas_of,
    colour_bar,
    legend_below,
    literal_text,
    styled,
)
from lirefs.statistics.intervals import Floats

if TYPE_CHECKING:
    from matplotlib.figure import Figure as Canvas


@dataclass(frozen=True, eq=False)
class Spectrum:
    """Curvature of one target, for the spectrum figure.

    Attributes:
        name: Name of the target.
        output_values: Eigenvalues of G, descending, shape (m,).
        input_values: Eigenvalues of A, descending, shape (n,).
        counts: Number of pairs kept in each row of the (m, n) mass, shape (m,).
        curve: Share of pairs and share of mass kept, shape (points, 2), ascending.
        keep: Share of the mass that was asked for.
    """

    name: str
    output_values: Floats
    input_values: Floats
    counts: Floats
    curve: Floats
    keep: float


def spectrum_of(name: str, lam: Floats, mu: Floats, keep: float) -> Spectrum:
    """The spectrum of a target from the descending eigenvalues of G and A."""
    size = len(lam) * len(mu)
    grid = [*np.linspace(0.05, 0.95, 19), 0.99, 0.999]
    curve = [(staircase(lam, mu, level).pairs / size, level) for level in grid]
    counts = staircase(lam, mu, keep).counts.astype(np.float64)
    return Spectrum(name, lam, mu, counts, np.array(curve), keep)


@styled
def draw_spectrum(spectra: Sequence[Spectrum]) -> Canvas:
    """Mass against share of pairs for every target, and one target's mass with its staircase."""
    names = _apart([one.name for one in spectra])
    columns = 1 if max(map(len, names)) > 20 else 2
    canvas, (left, right) = canvas_of(2, (WIDE, 3.1 + 0.15 * len(names) / columns))
    for index, (one, name) in enumerate(zip(spectra, names, strict=True)):
        colour = COLOURS[index % len(COLOURS)]
        style = "-" if index < len(COLOURS) else "--"
        left.plot(*one.curve.T, color=colour, ls=style, lw=1.2, label=literal_text(name))
        share = one.counts.sum() / (len(one.counts) * len(one.input_values))
        left.plot([share], [one.keep], "o", color=colour, ms=4)
    left.axhline(spectra[0].keep, color="black", lw=0.6, ls=":")
    left.set(xscale="log", xlabel="share of pairs kept", ylabel="share of curvature mass kept")
    left.set_title(f"dots: keep = {spectra[0].keep:g}", fontsize=8)
    legend_below(left, columns)

    shown = spectra[len(spectra) // 2]
    rows = np.unique(np.geomspace(1, len(shown.output_values), 300).astype(int)) - 1
    inputs = np.unique(np.geomspace(1, len(shown.input_values), 300).astype(int)) - 1
    mass = np.outer(shown.output_values[rows], shown.input_values[inputs])
    total = shown.output_values.sum() * shown.input_values.sum()
    shares = np.log10(np.maximum(mass / total, np.finfo(float).tiny))
    shading: dict[str, Any] = {"cmap": "cividis", "vmin": -12, "rasterized": True}
    picture = right.pcolormesh(inputs + 1, rows + 1, shares, **shading)
    kept = np.maximum(shown.counts[rows], 0.5)
    right.plot(kept, rows + 1, color=COLOURS[1], lw=1.6, label="kept: left of the line")
    right.set(xscale="log", yscale="log", xlim=(1, None), ylim=(len(shown.output_values), 1))
    right.set(xlabel="input eigenvector j", ylabel="output eigenvector i")
    right.set_title(literal_text(shown.name), fontsize=8)
    legend_below(right, columns=1)
    colour_bar(canvas, picture, right, "log10 share of mass")
    for each in (left.xaxis, right.xaxis, right.yaxis):
        each.set_major_formatter("{x:g}")  # exponents would be too small to read
        each.set_minor_formatter("")
    return canvas


def _apart(names: Sequence[str]) -> list[str]:
    """Return dotted names without the parts that all of them share."""
    parts = [name.split(".") for name in names]
    if len(names) < 2 or len({len(one) for one in parts}) > 1:
        return list(names)
    differ = [index for index, some in enumerate(zip(*parts, strict=True)) if len(set(some)) > 1]
    return [".".join(one[index] for index in differ) for one in parts]
