"""The report of `lirefs probe`: one HTML page that needs no other file."""

from __future__ import annotations

import json
from collections.abc import Mapping
from importlib import resources

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from lirefs.comparison.figures.figure import Figure
from lirefs.directions.probe import Probe
from lirefs.pictures import Picture

CAPTIONS = {
    "layers": (
        "Which layers separate the two classes?",
        "Test items of every layer with 95 % intervals. The bands are the controls: random "
        "directions and shuffled labels.",
    ),
    "best_layer": (
        "Could it be chance?",
        "The layer chosen on validation items, against shuffled labels with the layer chosen "
        "again, and against random directions.",
    ),
    "scatter": (
        "What does the separation look like?",
        "Test states on the first two principal components of the train states, with the boundary "
        "of the direction; and the cosine of the direction with each component.",
    ),
    "transfer": (
        "Does it hold on other questions?",
        "AUROC of the same directions on questions that they were not fitted on. For random "
        "directions, the better sign is taken.",
    ),
    "cosines": (
        "Do the layers share a direction?",
        "Cosines between the directions of each two layers.",
    ),
    "side_by_side": (
        "Does another model have the same direction?",
        "Separation in both models, and the cosine of their directions at each layer.",
    ),
}
"""Heading and caption of each figure, in the order of the page."""


def probe_page(model: str, questions: str, probe: Probe, figures: Mapping[str, Picture]) -> str:
    """The page; the same arguments give the same bytes."""
    environment = Environment(
        loader=PackageLoader("lirefs.cli", ""),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    style = resources.files("lirefs.comparison.report") / "report.css"
    shown = [Figure(name, *CAPTIONS[name], figures[name]) for name in CAPTIONS if name in figures]
    return environment.get_template("probe.html.j2").render(
        model=model,
        questions=questions,
        verdict=verdict(probe),
        probe=probe,
        figures=shown,
        settings=json.dumps(probe.directions.provenance, indent=1),
        style=Markup(style.read_text("utf-8")),
    )


def verdict(probe: Probe) -> list[str]:
    """What was found in three sentences, each with one number and its interval."""
    found = probe.best_scores.test_auroc
    separates = "separates" if found.low > 0.5 else "is not shown to separate"
    return [
        f"The direction of layer {probe.best_layer}, chosen on validation items, {separates} the "
        f"two classes: test AUROC {found:.2f}, n = {found.n}.",
        f"With shuffled labels, and the layer chosen again, the AUROC is {probe.shuffled:.2f} "
        f"(p = {probe.p_value:.3f}).",
        f"The words of the questions alone, without a model, reach {probe.bag_of_words:.2f}.",
    ]
