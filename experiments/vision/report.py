"""Files of the label-noise study: a table with intervals, figures and every number."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from experiments.vision import plots
from experiments.vision.edits import METRICS
from experiments.vision.plots import NAMES
from experiments.vision.study import PAPERS, UNEDITED, VisionStudy
from lirefs.comparison import Figure
from lirefs.files import atomic_write_text

FIGURES = ("keep", "blocks", "bands", "decays", "sheet")
FILES = ("report.md", *(f"{name}.{kind}" for name in FIGURES for kind in ("png", "svg")))
"""What `save` writes in addition to results.json."""
PAIRS = (("K-FAC", "random pairs"), ("K-FAC", "SVD"), ("K-FAC", "EK-FAC"), ("K-FAC", UNEDITED))


def save(study: VisionStudy, folder: Path, settings: dict[str, Any]) -> Path:
    """Write report.md, results.json and the figures.

    Args:
        study: The results.
        folder: Folder of the files; created if it is missing.
        settings: Settings of the run as JSON values, kept in results.json.

    Returns:
        The path of report.md.
    """
    figures = figures_of(study)
    for figure in figures:
        figure.picture.save(folder, figure.name)
    atomic_write_text(folder / "results.json", json.dumps(_numbers(study, settings), indent=1))
    lines = ["# Wrong labels, memorized and removed again", "", *table(study), ""]
    lines += [f"* {finding}" for finding in findings(study)]
    for figure in figures:
        lines += ["", f"## {figure.title}", "", f"![{figure.title}]({figure.name}.png)", ""]
        lines += [figure.caption]
    atomic_write_text(folder / "report.md", "\n".join(lines) + "\n")
    return folder / "report.md"


def table(study: VisionStudy) -> list[str]:
    """The variants as a Markdown table: means over seeds with Student's 95 % intervals, in %."""
    lines = [
        "| | setting | " + " | ".join(NAMES[metric] for metric in METRICS) + " |",
        "|---|---|" + "---|" * len(METRICS),
    ]
    for variant in study.variants:
        setting = study.chosen.get(variant)
        text = "" if setting is None else f"{setting.projections}, {setting.keep:g}"
        cells = [f"{study.mean(variant, m).value:.1%} {_range(study, variant, m)}" for m in METRICS]
        lines.append(f"| {variant} | {text} | " + " | ".join(cells) + " |")
    return lines


def findings(study: VisionStudy) -> list[str]:
    """The main results as sentences with intervals."""
    before, after = (study.mean(v, "recited").value for v in (UNEDITED, "K-FAC"))
    fall = f" ({1 - after / before:.0%} fewer)" if before > 0 else ""
    lines = [f"Noised labels recited: {before:.1%} before, {after:.1%} after the edit{fall}."]
    for one, other in PAIRS:
        parts = [
            f"{NAMES[metric]} {_points(study, one, other, metric)}"
            for metric in ("recited", "recovered", "test")
        ]
        lines.append(f"{one} minus {other}, in points, paired by seed: {'; '.join(parts)}.")
    kept = ", ".join(f"{share:.2%} by {method}" for method, share in study.shares.items())
    blocks = ", ".join(map(str, study.blocks))
    lines.append(
        f"Blocks edited: {blocks}. Share of their eigenvector pairs kept: {kept}. Each setting is "
        "the smallest keep at which mean validation accuracy falls by at most half a point; random "
        f"pairs are as many as K-FAC keeps. “{PAPERS}” is fixed, not chosen."
    )
    return lines


def figures_of(study: VisionStudy) -> list[Figure]:
    """All figures of the report."""
    seeds = f"Mean over {len(study.seeds)} seeds with Student's 95 % interval."
    return [
        Figure("keep", "Sweep over keep", seeds, plots.keep_sweep(study)),
        Figure("blocks", "One block at a time", seeds, plots.single_blocks(study)),
        Figure(
            "bands",
            "Activation by curvature band",
            f"{seeds} Recited noised images relative to training images with their true label.",
            plots.bands(study),
        ),
        Figure(
            "decays",
            "Weight decay",
            "Ratio of memorized to clean activation in each band, first seed; one row for each "
            "weight decay, with the share of noised labels recited before and after the edit.",
            plots.decays(study),
        ),
        Figure(
            "sheet",
            "Noised images",
            "First seed: the label shown in training, the true label, and the network's answers "
            "before and after the edit. Green: the true label is back.",
            plots.sheet(study.sheet),
        ),
    ]


def _range(study: VisionStudy, variant: str, metric: str) -> str:
    found = study.mean(variant, metric)
    return f"[{100 * found.low:.1f}, {100 * found.high:.1f}]"


def _points(study: VisionStudy, one: str, other: str, metric: str) -> str:
    found = study.difference(one, other, metric)
    return f"{100 * found.value:+.1f} [{100 * found.low:+.1f}, {100 * found.high:+.1f}]"


def _numbers(study: VisionStudy, settings: dict[str, Any]) -> dict[str, Any]:
    return {
        "settings": settings,
        "seeds": study.seeds,
        "blocks": study.blocks,
        "chosen": {method: asdict(setting) for method, setting in study.chosen.items()},
        "pairs_kept": study.shares,
        "variants": {name: [asdict(one) for one in own] for name, own in study.variants.items()},
        "differences": {
            f"{one} - {other}": {m: study.difference(one, other, m).to_dict() for m in METRICS}
            for one, other in PAIRS
        },
        "sweep": [
            {"method": m, "projections": p, "keep": k, "scores": [asdict(one) for one in own]}
            for (m, p, k), own in study.sweep.items()
        ],
        "single_blocks": [
            {"method": m, "block": b, "scores": [asdict(one) for one in own]}
            for (m, b), own in study.single.items()
        ],
        "bands": [
            {"inputs_of": one.names, "bands": one.labels, "ratio": one.ratio.tolist()}
            for one in study.bands
        ],
        "decays": [
            {
                "weight_decay": one.weight_decay,
                "before": asdict(one.before),
                "after": asdict(one.after),
                "ratio": None if one.bands is None else one.bands.ratio[0].tolist(),
            }
            for one in study.decays
        ],
    }
