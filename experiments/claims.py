"""The claims of both papers, asked of several organisms: one line each, pooled over their seeds.

    python -m experiments.claims organism experiments/organisms/seed-1 experiments/organisms/seed-2

runs the main job on each organism, or takes its report where it is done, measures the rest, and
prints for each claim whether it is confirmed, refuted or undecided, with the mean effect over the
organisms, its interval (`lirefs.statistics.pool_estimates`) and the effect in each. Interrupted,
the same command continues.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from math import hypot
from pathlib import Path
from typing import Any

import numpy as np

import kfac
import lirefs
from lirefs import LanguageModel
from lirefs.cli.passages import labelled_batch
from lirefs.comparison import Comparison, load_comparison
from lirefs.comparison.controls import SAME_DAMAGE
from lirefs.files import atomic_write_text, cache_dir, parse_json
from lirefs.main_job.factors import factors_of
from lirefs.main_job.organism import against_random
from lirefs.main_job.settings import READ, RECITED, TRUE
from lirefs.organism import Item, Language, language_seed, training_texts
from lirefs.organism.language import OFTEN, TALE_COUNTS
from lirefs.statistics import (
    Estimate,
    auroc,
    mean_estimate,
    paired_difference,
    pool_estimates,
    resample_counts,
)
from lirefs.tasks import token_nlls

RESAMPLES = 2000
NULL, NULL_RUNS = "null: ", 100
"""Starts the names of effects of null runs, in which pairs are swapped or labels shuffled."""
RELEARN_STEPS, RELEARN_LR = 20, 1e-4
"""Steps of fine-tuning on edited-out tales, at a rate that leaves the control its memories."""


@dataclass(frozen=True)
class Claim:
    """What a paper claims, as an effect that is above zero if the claim holds.

    Attributes:
        paper: Whose claim it is.
        text: The claim.
        effect: What is measured, in the given unit.
        control: What it is compared with.
        unit: "points" for differences between shares, "" for others.
    """

    paper: str
    text: str
    effect: str
    control: str
    unit: str = "points"


KFAC, LIREF = "K-FAC", "LiReF"
CLAIMS = {
    "recitation before arithmetic": Claim(
        KFAC, "recitation is lost before arithmetic",
        "retained of arithmetic minus retained of tales", "paired tasks of one edit",
    ),
    "arithmetic before logic": Claim(
        KFAC, "arithmetic is lost before logic",
        "retained of reasoning minus retained of arithmetic", "paired tasks of one edit",
    ),
    "rare before common facts": Claim(
        KFAC, "rare facts are lost before common ones",
        "retained of common facts minus retained of rare facts", "facts shown more often",
    ),
    "rare before common tales": Claim(
        KFAC, "rarely shown texts are lost before often shown ones",
        f"loss on tales shown {TALE_COUNTS[2]} times minus on those shown {TALE_COUNTS[-1]} times, "
        "in nats per token, under the edit", "tales shown more often", "",
    ),
    "known before unknown": Claim(
        KFAC, "the edit hurts known text before equally ordinary unknown text",
        "rise of the loss of recited tales minus that of their twins, nats per token",
        "twins", "",
    ),
    "bands": Claim(
        KFAC, "memorized text lies in flatter directions",
        "recited tales over twins, bottom half of the directions, mean of layers, minus 1",
        "twins", "",
    ),
    "detector": Claim(
        KFAC, "the flat share tells memorized text from other text",
        "AUROC of tales against twins minus 0.5", "twins", "",
    ),
    "relearning": Claim(
        KFAC, "edited-out texts come back when others are relearned",
        "recited of the other tales after training on half of them, minus on stories",
        "training on other text",
    ),
    "faster than new": Claim(
        KFAC, "edited-out texts are relearned faster than new ones are learned",
        f"recited after {RELEARN_STEPS} steps: edited-out tales minus never-seen twins",
        "twins, unedited model",
    ),
    "less recited than SVD": Claim(
        KFAC, "at equal perplexity it recites less than SVD",
        "recited under SVD minus under K-FAC", f"SVD at K-FAC{SAME_DAMAGE}",
    ),
    "less recited than BalancedSubnet": Claim(
        KFAC, "at equal perplexity it recites less than BalancedSubnet",
        "recited under BalancedSubnet minus under K-FAC", "BalancedSubnet, same perplexity",
    ),
    "less recited than random pairs": Claim(
        KFAC, "at equal perplexity it recites less than random pairs",
        "recited under random pairs minus under K-FAC", f"random pairs at K-FAC{SAME_DAMAGE}",
    ),
    "separation": Claim(
        LIREF, "a direction separates reasoning from memory",
        "test AUROC of the passage direction minus that of a bag of words", "bag of words", "",
    ),
    "transfer": Claim(
        LIREF, "the direction transfers to other questions",
        "AUROC of the passage direction on statement questions minus 0.5", "chance", "",
    ),
    "causal, exceptions": Claim(
        LIREF, "adding the direction brings reasoning back",
        "exceptions answered with the truth, beyond random directions",
        "random directions of the same norm and of the same perplexity",
    ),
    "causal, conflicts": Claim(
        LIREF, "adding the direction makes the model read",
        "conflicts answered from the passage, beyond random directions",
        "random directions of the same norm and of the same perplexity",
    ),
    "less recited when steered": Claim(
        LIREF, "adding the direction lowers recitation",
        "recited under a random direction of the same norm minus under LiReF add",
        "random direction of the same norm",
    ),
}  # fmt: skip


def from_report(comparison: Comparison) -> dict[str, Estimate]:
    """The effects that the report of a main job holds."""
    summary = comparison.summary()
    retained = {task: comparison.cell("K-FAC", task).retained for task in comparison.tasks}
    groups = {name: summary.means["K-FAC", name] for name in ("arithmetic", "reasoning")}
    common, rare, tales = (retained[one] for one in ("common facts", "rare facts", RECITED))
    found = {
        "recitation before arithmetic": minus(groups["arithmetic"], tales),
        "arithmetic before logic": minus(groups["reasoning"], groups["arithmetic"]),
        "rare before common facts": minus(common, rare),
    }
    rivals = {
        "SVD": "SVD",
        "BalancedSubnet": "BalancedSubnet",
        "random pairs": f"random pairs at K-FAC{SAME_DAMAGE}",
    }
    for name, rival in rivals.items():
        if rival in comparison.variants:
            gap = against_random(comparison, RECITED, rival, ["K-FAC"])
            found[f"less recited than {name}"] = gap
    controls = ["random direction", f"random direction at LiReF{SAME_DAMAGE}"]
    controls = [one for one in controls if one in comparison.variants]
    for name, task in (("exceptions", TRUE), ("conflicts", READ)):
        found[f"causal, {name}"] = against_random(comparison, task, "LiReF add", controls)
    found["less recited when steered"] = against_random(
        comparison, RECITED, "random direction", ["LiReF add"]
    )
    probe = comparison.provenance["probes"]["passage"]
    best = next(one for one in probe["layers"] if one["layer"] == probe["best_layer"])
    area, words = (Estimate(**e) for e in (best["test_auroc"], probe["bag_of_words_auroc"]))
    found["separation"] = minus(area, words)
    moved = Estimate(**comparison.provenance["transfer"]["passage on statement"])
    found["transfer"] = above_chance(moved)
    found[f"{NULL}separation 0"] = above_chance(Estimate(**probe["shuffled_auroc"]))
    return found


def above_chance(area: Estimate) -> Estimate:
    """An AUROC minus 0.5."""
    return Estimate(area.value - 0.5, area.low - 0.5, area.high - 0.5, area.n)


def minus(one: Estimate | None, other: Estimate | None) -> Estimate:
    """Difference of two independent estimates, its interval by the square-and-add rule."""
    assert one is not None
    assert other is not None
    value = one.value - other.value
    below = hypot(one.value - one.low, other.high - other.value)
    above = hypot(one.high - one.value, other.value - other.low)
    return Estimate(value, value - below, value + above, one.n + other.n)


def tales_and_twins(language: Language) -> tuple[list[Item], list[Item]]:
    """Test tales that training showed often, and their twins in the same order."""
    told = zip(language.items("tale", "test"), language.items("twin", "test"), strict=True)
    pairs = [(one, two) for one, two in told if (one.frequency or 0) >= OFTEN]
    return [one for one, _ in pairs], [two for _, two in pairs]


def swapped(known: Any, unknown: Any, rng: np.random.Generator) -> tuple[Any, Any]:
    """Two arrays of one value for each pair, half of the pairs exchanged: no effect is left."""
    exchanged = rng.random(len(known)) < 0.5
    return np.where(exchanged, unknown, known), np.where(exchanged, known, unknown)


def measured(
    lm: LanguageModel, language: Language, edit: kfac.CurvatureEdit
) -> dict[str, Estimate]:
    """The effects on tales and twins that need more than a report, and their null runs."""
    tales, twins = tales_and_twins(language)
    factors = edit.factors
    of_tales, of_twins = (
        kfac.band_profile(lm.model, lm.batches([one.text for one in items]), factors)
        for items in (tales, twins)
    )
    ratios = kfac.band_ratios(of_tales, of_twins).control
    bottom, low, high = (float(ratios[end, :, -1].mean()) - 1 for end in range(3))
    flat_told, flat_twins = (
        kfac.flat_shares(lm.model, lm.batches([one.text for one in items]), factors).passages
        for items in (tales, twins)
    )
    risen_told, risen_twins = (risen(lm, edit, items) for items in (tales, twins))
    draws = resample_counts(len(tales), RESAMPLES, 0)
    found = {
        "bands": Estimate(bottom, low, high, len(tales) + len(twins)),
        "detector": detected(flat_told, flat_twins),
        "known before unknown": paired_difference(risen_told, risen_twins, draws),
    }
    rng = np.random.default_rng(language.seed)
    for run in range(NULL_RUNS):
        found[f"{NULL}detector {run}"] = detected(*swapped(flat_told, flat_twins, rng))
        exchanged = swapped(risen_told, risen_twins, rng)
        found[f"{NULL}known before unknown {run}"] = paired_difference(*exchanged, draws)
    return found


def detected(known: Any, unknown: Any) -> Estimate:
    """AUROC of one set of scores against another, minus 0.5."""
    labels = np.repeat([1, 0], [len(known), len(unknown)])
    return above_chance(auroc(np.concatenate([known, unknown]), labels))


def by_showings(lm: LanguageModel, language: Language, edit: kfac.CurvatureEdit) -> Estimate:
    """Loss on tales that were shown seldom minus on those shown often, under the edit."""
    counts = TALE_COUNTS[2], TALE_COUNTS[-1]
    tales = language.items("tale", "test")
    with edit.apply(lm.model):
        seldom, frequent = (
            mean_estimate(answer_losses(lm, [one for one in tales if one.frequency == count]))
            for count in counts
        )
    return minus(seldom, frequent)


def answer_losses(lm: LanguageModel, items: Sequence[Item]) -> Any:
    """Nats per token of each item's answer, shape (n,)."""
    prompts, wholes = lm.encode([one.prompt for one in items]), lm.encode([i.text for i in items])
    nlls = token_nlls(lm, wholes)
    counts = [len(whole) - len(start) for start, whole in zip(prompts, wholes, strict=True)]
    return np.array([float(nll[-n:].double().mean()) for nll, n in zip(nlls, counts, strict=True)])


def risen(lm: LanguageModel, edit: kfac.CurvatureEdit, items: Sequence[Item]) -> Any:
    """By how much the edit raises the loss of each item's answer."""
    before = answer_losses(lm, items)
    with edit.apply(lm.model):
        return answer_losses(lm, items) - before


def relearned(
    lm: LanguageModel, language: Language, edit: kfac.CurvatureEdit
) -> dict[str, Estimate]:
    """Whether the tales that the edit took come back, and faster than their twins are learned."""
    told, unseen = ([batch_of(lm, one) for one in items] for items in tales_and_twins(language))
    with edit.apply(lm.model):
        kept = kfac.teacher_forced_matches(lm.model.eval(), told).bool().tolist()
    gone, new = ([b for b, k in zip(some, kept, strict=True) if not k] for some in (told, unseen))
    half = len(gone) // 2
    stories = [whole(lm, text) for text in language.texts("train", half)]
    options: dict[str, Any] = {"steps": (0, RELEARN_STEPS), "lr": RELEARN_LR, "progress": False}
    back = kfac.relearn(
        lm.model, {"edited": edit, "never edited": None}, gone[:half], gone[half:], other=stories,
        **options,
    )  # fmt: skip
    learned = kfac.relearn(lm.model, {"never edited": None}, new[:half], new[half:], **options)
    return {
        "relearning": minus(back.rest["edited"][-1], back.rest["edited (other text)"][-1]),
        "faster than new": minus(back.known["edited"][-1], learned.known["never edited"][-1]),
        "control keeps": back.rest["never edited"][-1],
    }


def batch_of(lm: LanguageModel, item: Item) -> dict[str, Any]:
    """One item as a batch, whose answer alone is counted."""
    prompt, text = lm.encode([item.prompt])[0], lm.encode([item.text])[0]
    return labelled_batch(lm, prompt, text[len(prompt) :])


def whole(lm: LanguageModel, text: str) -> dict[str, Any]:
    """One text as a batch, all of it counted."""
    ids = lm.encode([text])[0]
    return labelled_batch(lm, ids[:1], ids[1:])


def effects_of(name: str, out: Path) -> dict[str, Estimate]:
    """All effects in one organism; run what is missing of its main job and of the rest."""
    done = out / "effects.json"
    if done.exists():
        return {key: Estimate(**one) for key, one in parse_json(done.read_text("utf-8")).items()}
    lm = lirefs.load(name)
    if not (out / "report" / "results.json").exists():
        lirefs.main_job.run(lm, out=out / "report", resume=True)
    comparison = load_comparison(out / "report")
    language = Language(language_seed(name) or 0)
    kept = comparison.provenance["interventions"]["K-FAC"]["keep"]
    layers, texts = list(range(lm.n_layers)), training_texts(language, 1500)
    factors = factors_of(lm, layers, None, cache_dir(), 0, texts)  # those of the main job
    edit = kfac.CurvatureEdit(factors, kept)
    found = {
        **from_report(comparison),
        **measured(lm, language, edit),
        "rare before common tales": by_showings(lm, language, edit),
        **relearned(lm, language, edit),
    }
    atomic_write_text(done, json.dumps({key: asdict(one) for key, one in found.items()}, indent=1))
    return found


def verdict(pooled: Estimate) -> str:
    """What an effect says about its claim; that of one organism alone has no bounds."""
    if pooled.low > 0:
        return "confirmed"
    return "refuted" if pooled.high < 0 else "undecided"


def table(effects: Mapping[str, Mapping[str, Estimate]]) -> str:
    """Every claim as a line of Markdown."""
    names = list(effects)
    lines = [f"Organisms: {', '.join(names)}. Effects above 0 are in favour of the claim.", "",
             "| paper | claim | verdict | effect | control | each |", "|---" * 6 + "|"]  # fmt: skip
    for key, claim in CLAIMS.items():
        each = [one[key] for one in effects.values() if key in one]
        if len(each) < len(names):
            lines.append(f"| {claim.paper} | {claim.text} | not measured | {claim.effect} | | |")
            continue
        scale, digits = (100, 0) if claim.unit else (1, 3)
        pooled = pool_estimates(each)
        numbers = [f"{scale * one:+.{digits}f}" for one in (pooled.value, pooled.low, pooled.high)]
        shown = f"{numbers[0]} [{numbers[1]}, {numbers[2]}] {claim.unit}".strip()
        by_seed = ", ".join(f"{scale * one.value:+.{digits}f}" for one in each)
        lines.append(
            f"| {claim.paper} | {claim.text} | **{verdict(pooled)}** | {claim.effect}: {shown} "
            f"(n = {pooled.n}) | {claim.control} | {by_seed} |"
        )
    runs: dict[str, list[Estimate]] = {}
    for key in filter(lambda one: one.startswith(NULL), next(iter(effects.values()))):
        pooled = pool_estimates([one[key] for one in effects.values()])
        runs.setdefault(key.removeprefix(NULL).rpartition(" ")[0], []).append(pooled)
    for name, some in runs.items():
        missed = f"{sum(not one.low <= 0 <= one.high for one in some)} of {len(some)} left out 0"
        mean = float(np.mean([one.value for one in some]))
        lines.append(f"| null run | {name} | {missed} | mean {mean:+.3f} | | |")
    kept = [one["control keeps"].value for one in effects.values() if "control keeps" in one]
    if kept:
        lines += ["", f"Relearning: the never-edited control recites {min(kept):.0%} or more."]
    return "\n".join(lines)


def main() -> None:
    """Measure every organism, pool, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("organisms", nargs="+", help='"organism" or folders of organisms')
    parser.add_argument("--out", type=Path, default=Path("claims"), help="folder of the results")
    options = parser.parse_args()
    effects = {
        Path(name).name: effects_of(name, options.out / Path(name).name)
        for name in options.organisms
    }
    text = table(effects)
    atomic_write_text(options.out / "claims.md", text + "\n")
    print(text)


if __name__ == "__main__":
    main()
