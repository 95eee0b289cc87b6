"""A comparison as one HTML page that refers to nothing outside itself."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from importlib import resources
from typing import TYPE_CHECKING, Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from lirefs.comparison import results_file as storage
from lirefs.comparison.item_changes import Flip, flips
from lirefs.comparison.report import tables

if TYPE_CHECKING:
    from lirefs.comparison.comparison import Comparison
    from lirefs.comparison.figures.figure import Figure

MOST_FLIPS = 5000
"""Flipped items that a page holds at most: the first ones of each task and variant."""
MOST_LETTERS = 4000
"""Letters of one text of a flipped item; the middle of a longer one is left out."""
_MOST_SETTINGS = 120
_SHORTEST_SHARED = 80


def html(comparison: Comparison, figures: Sequence[Figure]) -> str:
    """The report as one HTML page; the same comparison and figures give the same bytes."""
    environment = Environment(
        loader=PackageLoader("lirefs.comparison.report", ""),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    listed = {
        (task, variant): flips(comparison, task, variant)
        for task in comparison.tasks
        for variant in comparison.variants[1:]
    }
    total, each = sum(map(len, listed.values())), _each(listed)
    shown = {key: some[:each] for key, some in listed.items()}
    return environment.get_template("report.html.j2").render(
        title=title(comparison),
        findings=findings(comparison),
        overview=tables.overview(comparison),
        legend=tables.LEGEND,
        figures=figures,
        groups=_by_group(comparison),
        n_flips=total,
        n_shown=sum(map(len, shown.values())),
        each=each,
        flips=_in_script(_flip_data(comparison, shown)),
        summary=_summary(comparison),
        settings=settings(comparison),
        style=_source("report.css"),
        script=_source("report.js"),
        finite=math.isfinite,
    )


def title(comparison: Comparison) -> str:
    """Heading of a report."""
    return f"Reasoning against recitation in {comparison.provenance.get('model_name', 'a model')}"


def findings(comparison: Comparison) -> list[str]:
    """What was found, in words, where whoever made the comparison said so."""
    return [str(one) for one in comparison.provenance.get("findings", [])]


def settings(comparison: Comparison) -> str:
    """Every setting and hash, as JSON text."""
    return json.dumps(_settings(comparison), indent=1)


def _settings(comparison: Comparison) -> dict[str, Any]:
    made_by = {key: one for key, one in comparison.provenance.items() if key != "findings"}
    bootstrap = {"resamples": comparison.resamples, "seed": comparison.seed}
    found: dict[str, Any] = storage.plain({**made_by, "bootstrap": bootstrap})
    return found


def _by_group(comparison: Comparison) -> dict[str, list[tables.Table]]:
    groups: dict[str, list[tables.Table]] = {}
    for task, info in comparison.tasks.items():
        groups.setdefault(info.group, []).append(tables.of_task(comparison, task))
    return groups


def _summary(comparison: Comparison) -> list[tuple[str, str]]:
    """Settings line by line; a long branch is only counted, the JSON has it."""
    lines = []
    for key, value in _settings(comparison).items():
        leaves = list(_leaves(value, key))
        if len(leaves) > _MOST_SETTINGS:
            lines.append((key, f"{len(leaves):,} values, in the JSON below"))
        else:
            lines += leaves
    return lines


def _leaves(value: Any, name: str) -> Iterator[tuple[str, str]]:
    if isinstance(value, Mapping) and value:
        for key, entry in value.items():
            yield from _leaves(entry, f"{name} / {key}")
    elif isinstance(value, list) and any(isinstance(one, Mapping | list) for one in value):
        for place, entry in enumerate(value):
            yield from _leaves(entry, f"{name} / {place}")
    elif isinstance(value, list):
        yield name, ", ".join(map(_word, value)) or "none"
    else:
        yield name, _word(value)


def _word(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _each(listed: Mapping[tuple[str, str], Sequence[Flip]]) -> int:
    """How many flips of each task and variant a page holds."""
    sizes = [len(some) for some in listed.values()]
    numbers = range(max(sizes, default=0), -1, -1)
    return next(n for n in numbers if sum(min(size, n) for size in sizes) <= MOST_FLIPS)


def _flip_data(
    comparison: Comparison, shown: Mapping[tuple[str, str], Sequence[Flip]]
) -> dict[str, Any]:
    """Flips for the page: what was asked stands once, not once for every variant."""
    shared = {
        task: shared_beginning([item.prompt for item in items])
        for task, items in comparison.results[comparison.variants[0]].items()
    }
    tasks, variants = list(comparison.tasks), comparison.variants[1:]
    items: list[list[Any]] = []
    places: dict[tuple[str, ...], int] = {}
    rows = []
    for (task, variant), some in shown.items():
        for one in some:
            rest = one.prompt[len(shared[task]) :]
            key = (task, one.id, rest, one.expected, one.before)
            if key not in places:
                places[key] = len(items)
                texts = [_cut(text) for text in (rest, one.expected, one.before)]
                items.append([tasks.index(task), one.id, *texts])
            rows.append([places[key], variants.index(variant), int(one.gained), _cut(one.after)])
    return {
        "tasks": tasks,
        "variants": variants,
        "shared": [_cut(shared[task]) for task in tasks],
        "items": items,
        "flips": rows,
    }


def shared_beginning(prompts: Sequence[str]) -> str:
    """The lines that all prompts begin with (few-shot examples); empty where they are few."""
    if len(prompts) < 2:
        return ""
    first, last = min(prompts), max(prompts)  # what these two share, all share
    pairs = enumerate(zip(first, last, strict=False))
    common = first[: next((place for place, (a, b) in pairs if a != b), min(len(first), len(last)))]
    whole = common[: common.rfind("\n") + 1]
    return whole if len(whole) >= _SHORTEST_SHARED else ""


def _cut(text: str) -> str:
    if len(text) <= MOST_LETTERS:
        return text
    half = MOST_LETTERS // 2
    return f"{text[:half]} [... {len(text) - 2 * half} letters left out ...] {text[-half:]}"


def _in_script(value: Any) -> Markup:
    """JSON for a script element, with nothing that could end it or begin a comment."""
    text = json.dumps(value, separators=(",", ":"))  # ASCII alone
    for letter in "<>&":
        text = text.replace(letter, f"\\u{ord(letter):04x}")
    return Markup(text)


def _source(name: str) -> Markup:
    """A file of this package's own, to stand in the page as it is."""
    return Markup((resources.files("lirefs.comparison.report") / name).read_text("utf-8"))
