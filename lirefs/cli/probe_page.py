"""The report of `lirefs probe`: one HTML page that needs no other file."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from importlib import resources

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from lirefs.comparison.figures.figure import Figure
from lirefs.directions.probe import LayerScores, Probe
from lirefs.errors import visible
from lirefs.pictures import Picture
from lirefs.statistics.intervals import Estimate

CAPTIONS = {
    "layers": (
        "Which layers separate the two classes?",
        "Test items of every layer with 95 % intervals. The orange and grey bands are the "
        "controls: random directions and shuffled labels. Undefined values are left out.",
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
        "Cosines between the directions of every pair of layers; n/a where a layer has none.",
    ),
    "side_by_side": (
        "Does another model have the same direction?",
        "Separation in both models, and the cosine of their directions at each layer.",
    ),
}
"""Heading and caption of each figure, in the order of the page."""


def probe_page(
    model: str,
    questions: str,
    probe: Probe,
    figures: Mapping[str, Picture],
    run: Mapping[str, str],
) -> str:
    """The page, with `run` in its head; the same arguments give the same bytes."""
    environment = Environment(
        loader=PackageLoader("lirefs.cli", ""),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    style = resources.files("lirefs.comparison.report") / "report.css"
    shown = [Figure(name, *CAPTIONS[name], figures[name]) for name in CAPTIONS if name in figures]
    text = environment.get_template("probe.html.j2").render(
        about={"model": model, **run},
        columns=COLUMNS,
        cells=[_cells(probe, one) for one in probe.scores],
        undefined=any(not math.isfinite(one.spearman.value) for one in probe.scores),
        questions=questions,
        verdict=verdict(probe),
        probe=probe,
        figures=shown,
        settings=json.dumps(probe.directions.provenance, indent=1),
        style=Markup(style.read_text("utf-8")),
    )
    return visible(text)


def verdict(probe: Probe) -> list[str]:
    """What was found in four sentences, each with one number and its interval."""
    found = probe.best_scores.test_auroc
    separates = "separates" if found.low > 0.5 else "is not shown to separate"
    first, second = probe.names
    return [
        f"The direction of layer {probe.best_layer}, chosen on validation items, {separates} "
        f"{first} from {second}: test AUROC {found:.2f}, n = {found.n}, p = {probe.p_value:.3f}.",
        f"With shuffled labels, and the layer chosen again, the AUROC is {probe.shuffled:.2f}; the "
        "direction's p-value is its rank among these shuffles.",
        f"Random directions at this layer reach {probe.best_scores.random_auroc:.2f}: the centre "
        "may be above 0.5, because each takes the sign that is better on train items.",
        f"The words of the questions alone, without a model, reach {probe.bag_of_words:.2f}.",
    ]


COLUMNS = {
    "validation AUROC": "validation_auroc",
    "test AUROC": "test_auroc",
    "test accuracy": "test_accuracy",
    "Spearman": "spearman",
    "shuffled labels": "shuffled_auroc",
    "random directions": "random_auroc",
}
"""Heads of the table's columns, to the scores below them."""


def _cells(probe: Probe, scores: LayerScores) -> list[tuple[str, str]]:
    """The scores of a layer as texts and intervals; n/a where one is undefined."""
    cells = []
    for name in COLUMNS.values():
        one: Estimate = getattr(scores, name)
        if name == "shuffled_auroc" and scores.layer == probe.best_layer:
            one = probe.shuffled  # as the verdict has it: each shuffle chooses its layer
        text, _, interval = f"{one:.2f}".partition(" ")
        cells.append((text, interval) if math.isfinite(one.value) else ("n/a", ""))
    return cells
