"""Does the edit hurt recited text before equally ordinary unrecited text of the same sources?

SmolLM2 continues the project's recited passages word for word. The unrecited ones are of the same
sources: other sentences of the same documents, and sequences, definitions and code of the same
kinds. The loss of each suffix is measured before and under the K-FAC edit of the main job, and
under SVD, random pairs and BalancedSubnet at its perplexity. BalancedSubnet learns from recited
passages: it is fitted twice, on half of the sources each time, and a passage is read under the fit
that has not seen its source. With another model, only the passages that it recites count as
recited, and only those that it does not as unrecited.

    python -m experiments.recited --model smollm2-135m
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

import kfac
import lirefs
from experiments.claims import minus
from lirefs import LanguageModel
from lirefs.errors import SettingError
from lirefs.files import atomic_write_text, cache_dir
from lirefs.main_job.factors import edited_layers, factors_of
from lirefs.main_job.matching import (
    Damage,
    Rival,
    at_equal_damage,
    rivals_of_edit,
    subnet_rival,
)
from lirefs.model.intervention import Intervention, applied
from lirefs.statistics import Estimate, mean_estimate, wilson
from lirefs.tasks import calibration_texts, heldout_texts, recitation_task, token_nlls
from lirefs.tasks.recitation import Recitation
from lirefs.tasks.shipped_data import DATA
from lirefs.tasks.texts import text_rows

RECITED, UNRECITED = DATA / "passages.jsonl", DATA / "passages_unrecited.jsonl"
LIKELY = 1.0
"""Loss in nats per token below which a passage is likely, though it may not be recited."""

Variant = Intervention | tuple[Any, Any]
"""An intervention; or one for the passages of each half of the sources."""

KEEP = 0.8
"""Share of the curvature mass that the edit keeps; the main job's choice is milder."""


@dataclass(frozen=True)
class Passages:
    """Passages of one side.

    Attributes:
        task: Asks for their recitation.
        kinds: What each is of: "Sequence", "Definition", "Code boilerplate" or "Document".
        second: Whether the source of each is in the second half of the sources, shape (n,).
        losses: Nats per token of each suffix in the unchanged model, shape (n,).
    """

    task: Recitation
    kinds: list[str]
    second: Any
    losses: Any

    def only(self, chosen: Sequence[int]) -> Passages:
        """Some of them, by number."""
        task = replace(self.task, items=[self.task.items[one] for one in chosen])
        kinds, which = [self.kinds[one] for one in chosen], list(chosen)
        return Passages(task, kinds, self.second[which], self.losses[which])


def suffix_losses(lm: LanguageModel, task: Recitation) -> Any:
    """Nats per token of each suffix after its prefix, shape (n,)."""
    nlls = token_nlls(lm, [[*prefix, *suffix] for _, prefix, suffix in task.items])
    lengths = [len(suffix) for _, _, suffix in task.items]
    return np.array([float(one[-n:].double().mean()) for one, n in zip(nlls, lengths, strict=True)])


def recitation(lm: LanguageModel, task: Recitation) -> list[dict[str, float]]:
    """Scores of each continuation, by `lirefs.tasks.recitation_scores`."""
    return [dict(one.scores) for one in task.run(lm, lambda n: None)]


def read_passages(lm: LanguageModel, path: Path, recited: bool) -> Passages:
    """Those of a file that the model recites, or those that it does not even nearly recite.

    Raises:
        SettingError: Fewer than two are left.
    """
    task = recitation_task(lm, path, name=path.stem)
    sources = [str(row.fields.get("source", "")) for row in text_rows(path, "passages")]
    scores = recitation(lm, task)
    wanted = [one["strict"] == 1 if recited else one["loose"] == 0 for one in scores]
    chosen = [number for number, yes in enumerate(wanted) if yes]
    if len(chosen) < 2:
        words = "recites" if recited else "does not recite"
        raise SettingError(f"{path}: {lm.name} {words} {len(chosen)} of {len(wanted)}; 2 needed")
    kinds, losses = list(map(kind_of, sources)), suffix_losses(lm, task)
    return Passages(task, kinds, np.array(list(map(second_half, sources))), losses).only(chosen)


def kind_of(source: str) -> str:
    """The kind of a source: what is before its colon; without one, a document that is quoted."""
    kind, colon, _ = source.partition(":")
    return kind if colon else "Document"


def second_half(source: str) -> bool:
    """Whether a source is in the second half; what stands in other forms is in one half."""
    (name, *_) = re.split(r" \(| as | with ", source)
    return bool(hashlib.sha256(name.encode()).digest()[0] % 2)


def subnets(
    lm: LanguageModel, names: Sequence[str], passages: Passages, general: Sequence[str], seed: int
) -> list[Rival]:
    """BalancedSubnet that forgets the second half of the sources, and one that forgets the first.

    Raises:
        SettingError: All passages are of one half.
    """
    decode = partial(lm.tokenizer.decode, skip_special_tokens=True)
    texts = [str(decode([*prefix, *suffix])) for _, prefix, suffix in passages.task.items]
    halves = [
        [text for text, second in zip(texts, passages.second, strict=True) if second == one]
        for one in (True, False)
    ]
    if not all(halves):
        raise SettingError("BalancedSubnet needs passages of several sources; use --no-rivals")
    return [subnet_rival(lm, names, general, half, seed) for half in halves]


def groups_of(sides: Sequence[Passages]) -> dict[str, list[list[int]]]:
    """Numbers of the passages of each side, by group; none has fewer than two on a side."""
    kinds = dict.fromkeys(kind for side in sides for kind in side.kinds)
    groups = {"all": [list(range(len(side.kinds))) for side in sides]}
    groups |= {
        kind: [[i for i, one in enumerate(side.kinds) if one == kind] for side in sides]
        for kind in kinds
    }
    name = f"loss before below {LIKELY:g}"
    groups[name] = [np.flatnonzero(side.losses < LIKELY).tolist() for side in sides]
    return {name: each for name, each in groups.items() if min(map(len, each)) > 1}


def read_under(
    lm: LanguageModel, variant: Variant, sides: Sequence[Passages]
) -> list[tuple[Any, Any]]:
    """Loss of each suffix and whether it is recited, for each side, both of shape (n,)."""
    if isinstance(variant, tuple):
        first, second = (read_under(lm, one, sides) for one in variant)
        return [
            (np.where(side.second, b[0], a[0]), np.where(side.second, b[1], a[1]))
            for side, a, b in zip(sides, first, second, strict=True)
        ]
    with applied(variant, lm.model):
        return [
            (suffix_losses(lm, one), np.array([each["strict"] for each in recitation(lm, one)]))
            for one in (side.task for side in sides)
        ]


def measured(
    lm: LanguageModel, variants: Mapping[str, Variant], sides: Sequence[Passages]
) -> dict[str, Any]:
    """Of each variant: share recited, and by group the rise of each side's loss and the difference.

    `losses` are those of all passages, recited ones first.
    """
    groups, found = groups_of(sides), {}
    for name, variant in variants.items():
        losses, strict = zip(*read_under(lm, variant, sides), strict=True)
        rises = [after - side.losses for after, side in zip(losses, sides, strict=True)]
        shares = [wilson(int(each.sum()), len(each)) for each in strict]
        rows = {}
        for group, chosen in groups.items():
            each = [mean_estimate(rise[which]) for rise, which in zip(rises, chosen, strict=True)]
            rows[group] = [*each, minus(*each)]
        found[name] = {"recited": shares, "rises": rows, "losses": [one.tolist() for one in losses]}
    return found


def table(found: Mapping[str, Any], sides: Sequence[Passages], settings: Mapping[str, str]) -> str:
    """The results as Markdown."""
    before = [mean_estimate(side.losses) for side in sides]
    lines = [
        f"{len(sides[0].kinds)} recited and {len(sides[1].kinds)} unrecited passages; nats per "
        f"token of their suffixes before: {before[0]:.2f} and {before[1]:.2f}.",
        "",
        "| edit | setting | recited still | others recited |",
        "|---|---|---|---|",
    ]
    for name, one in found.items():
        shares = " | ".join(percent(share) for share in one["recited"])
        lines.append(f"| {name} | {settings[name]} | {shares} |")
    lines += [
        "",
        "Rise of the loss, nats per token:",
        "",
        "| edit | passages | n | recited | unrecited | difference |",
        "|---|---|---|---|---|---|",
    ]
    for name, one in found.items():
        for group, (known, unknown, gap) in one["rises"].items():
            numbers = f"{known:+.2f} | {unknown:+.2f} | {gap:+.2f}"
            lines.append(f"| {name} | {group} | {known.n} and {unknown.n} | {numbers} |")
    return "\n".join(lines)


def percent(share: Estimate) -> str:
    """A share with its interval, in percent."""
    value, low, high = (f"{100 * one:.0f}" for one in (share.value, share.low, share.high))
    return f"{value}% [{low}, {high}]"


def run(options: argparse.Namespace) -> str:
    """Measure, write `recited.json` and `recited.md`, and return the latter."""
    lm = lirefs.load(options.model)
    sides = [
        read_passages(lm, path, recited)
        for path, recited in ((options.recited, True), (options.unrecited, False))
    ]
    layers = edited_layers(lm, options.layers)
    factors = factors_of(lm, layers, None, cache_dir(), options.seed, calibration_texts())
    edit = kfac.CurvatureEdit(factors, options.keep)
    variants: dict[str, Any] = {"K-FAC": edit}
    settings = {"K-FAC": f"layers {', '.join(map(str, layers))}; keep {options.keep:g}"}
    if options.rivals:
        damage = Damage(lm, [text for _, text in heldout_texts("validation")])
        general = calibration_texts()
        pair = subnets(lm, factors.names, sides[0], general, options.seed)
        named = [f"BalancedSubnet, fit {number}" for number in (1, 2)]
        rivals = rivals_of_edit(factors, factors.names, options.seed)
        rivals |= dict(zip(named, pair, strict=True))
        equal = at_equal_damage(damage, "K-FAC", edit, rivals)
        print(equal.finding)
        variants |= equal.interventions
        settings |= {
            name: one.setting + ("" if one.equal else " (not equal)")
            for name, one in equal.matches.items()
        }
        variants["BalancedSubnet"] = tuple(variants.pop(name) for name in named)
        settings["BalancedSubnet"] = "; ".join(settings.pop(name) for name in named)
    found = measured(lm, variants, sides)
    text = table(found, sides, settings)
    record = {
        name: one
        | {
            "recited": [share.to_dict() for share in one["recited"]],
            "rises": {key: [r.to_dict() for r in rows] for key, rows in one["rises"].items()},
        }
        for name, one in found.items()
    }
    record["before"] = {
        side.task.name: {
            "ids": [item for item, _, _ in side.task.items], "losses": side.losses.tolist()
        }
        for side in sides
    }  # fmt: skip
    atomic_write_text(options.out / "recited.json", json.dumps(record, indent=1))
    atomic_write_text(options.out / "recited.md", text + "\n")
    return text


def main() -> None:
    """Parse the arguments, run, and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2-135m", help="built-in name, folder or hub id")
    parser.add_argument("--recited", type=Path, default=RECITED, help="JSON Lines")
    parser.add_argument("--unrecited", type=Path, default=UNRECITED, help="JSON Lines")
    parser.add_argument("--layers", type=int, nargs="+", help="layers whose MLPs are edited")
    parser.add_argument("--keep", type=float, default=KEEP, help="share of the curvature mass")
    parser.add_argument("--no-rivals", dest="rivals", action="store_false", help="K-FAC alone")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("recited"), help="folder of the results")
    print(run(parser.parse_args()))


if __name__ == "__main__":
    main()
