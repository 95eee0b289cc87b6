"""A comparison as one HTML page that refers to nothing outside itself."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from importlib import resources
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from lirefs.comparison.controls import control_reasons
from lirefs.comparison.figures.figure import Figure
from lirefs.comparison.report import tables
from lirefs.comparison.report.flip_list import FlipList
from lirefs.comparison.report.verdict import verdict
from lirefs.comparison.report.words import words_used
from lirefs.comparison.summary import Summary
from lirefs.errors import visible

_MOST_SETTINGS = 120
_LONGEST_NUMBER = 8
"""Characters of a setting that is shown in full; longer ones are rounded, the JSON has them."""


def html_page(
    summary: Summary, flips: FlipList, figures: Sequence[Figure], left_out: Sequence[str] = ()
) -> str:
    """The report as one HTML page; the same arguments give the same bytes.

    The figure named `retained`, or else the first, stands on the first screen.
    """
    environment = Environment(
        loader=PackageLoader("lirefs.comparison.report", ""),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["whole"] = _whole
    groups: dict[str, list[tables.Table]] = {}
    for task, info in summary.tasks.items():
        groups.setdefault(info.group, []).append(tables.task_table(summary, task))
    main_figure = next(
        (one for one in figures if one.name == "retained"), next(iter(figures), None)
    )
    text = environment.get_template("report.html.j2").render(
        title=summary.title,
        about=tables.about_run(summary),
        verdict=verdict(summary),
        notes=summary.notes,
        legend=tables.legend(summary),
        controls=control_reasons([one for one in summary.methods_first if one in summary.controls]),
        findings=list(map(_claim_and_rest, summary.findings)),
        words=words_used(summary),
        overview=tables.overview_table(summary),
        equal=tables.equal_tables(summary),
        statistics=tables.STATISTICS,
        adjusted=tables.ADJUSTED,
        main_figure=main_figure,
        figures=[one for one in figures if one is not main_figure],
        left_out=left_out,
        groups=groups,
        flips=flips,
        flip_data=_in_script(flips.data),
        setting_lines=_setting_lines(summary.settings),
        settings=json.dumps(summary.settings, indent=1),
        style=_source("report.css"),
        script=_source("report.js"),
        finite=math.isfinite,
    )
    return visible(text)


def _whole(text: str) -> str:
    """A text in which no line ends within a percentage or an interval."""
    return re.sub(r" %(?: (?=\[))?|\[[-+.,\d ]+\]", lambda one: one[0].replace(" ", "\u00a0"), text)


def _claim_and_rest(finding: str) -> tuple[str, str]:
    """A finding's first sentence, which may have a number before it, and its others."""
    if finding.endswith("?"):
        return finding, ""  # a heading
    found = re.match(r"(?:\d+\. )?.*?\.(?= |$)", finding, re.DOTALL)
    end = found.end() if found else len(finding)
    return finding[:end], finding[end:]


def _setting_lines(settings: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Settings line by line; a long branch is only counted, the JSON has it."""
    lines = []
    for key, value in settings.items():
        leaves = list(_leaves(value, key))
        many = len(leaves) > _MOST_SETTINGS
        lines += [(key, f"{len(leaves):,} values, in the JSON below")] if many else leaves
    return lines


def _leaves(value: Any, name: str) -> Iterator[tuple[str, str]]:
    if isinstance(value, Mapping) and value:
        for key, entry in value.items():
            yield from _leaves(entry, f"{name} / {key}")
    elif isinstance(value, list) and any(isinstance(one, Mapping | list) for one in value):
        yield from _leaves(dict(enumerate(value)), name)
    elif isinstance(value, list):
        yield name, ", ".join(map(_word, value)) or "none"
    else:
        yield name, _word(value)


def _word(value: Any) -> str:
    if isinstance(value, str):
        return value
    text = json.dumps(value)
    return f"{value:.4g}" if isinstance(value, float) and len(text) > _LONGEST_NUMBER else text


def _in_script(value: Any) -> Markup:
    """JSON for a script element, with nothing that could end it or begin a comment."""
    text = json.dumps(value, separators=(",", ":"))  # pure ASCII
    return Markup(text.translate({ord(one): f"\\u{ord(one):04x}" for one in "<>&"}))


def _source(name: str) -> Markup:
    """A file of this folder, inserted into the page unchanged."""
    return Markup((resources.files("lirefs.comparison.report") / name).read_text("utf-8"))
