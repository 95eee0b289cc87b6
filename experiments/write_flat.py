"""What it costs to write new facts along flat or sharp pairs, and what an edit then removes.

The organism is taught facts about strangers, each arm to the same accuracy: with free gradients,
and with `kfac.projected_training` on the flat half of the pairs, on the sharp half and on a random
half (CrispEdit: Ikram et al. 2026, arXiv 2602.15823). Then skills, older facts and perplexity are
scored on the same items, and each arm is edited at the same rise in perplexity.

    python -m experiments.write_flat --out write_flat

continues where it was stopped: a finished arm is a file in the folder.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from random import Random
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

import kfac
import lirefs
from kfac.factors.tensor_file import read_tensors, write_tensors
from lirefs import LanguageModel
from lirefs.comparison import Comparison
from lirefs.errors import SettingError
from lirefs.files import atomic_write_text, parse_json, refuse_foreign
from lirefs.main_job.matching import perplexity
from lirefs.model.training.copies import trainable
from lirefs.model.training.steps import checked_step
from lirefs.organism import Language, organism_tasks, training_texts
from lirefs.organism.people import ATTRIBUTES, stranger
from lirefs.pictures import COLOURS, canvas_of, picture_of
from lirefs.statistics import Estimate
from lirefs.statistics.paired import paired_difference
from lirefs.tasks import ShortAnswer

ARMS = ("free", "flat", "sharp", "random")
NEW = "new facts"
HEADER = "write_flat"
TASKS = (
    "common facts", "rare facts", "tales", "addition", "subtraction", "relations",
    "object tracking", "boolean expressions", "retrieval", "retrieval in two steps", "stories",
)  # fmt: skip
"""What a write may cost: names of `organism_tasks`."""
TEXTS = 400
"""Texts that curvature is collected from."""
BATCH, TAUGHT, MOST_EPOCHS = 100, 0.95, 200
RISE, BISECTIONS, REMOVED = 1.02, 9, (1e-5, 0.3)
"""The edit of each arm raises the perplexity of validation texts by this factor."""


class Written(kfac.WeightEdit):
    """Changes of weights that a training run has made, put in place and taken out like an edit."""

    kind = "written"

    def __init__(self, arm: str, changes: Mapping[str, Tensor]) -> None:
        self.arm, self.changes = arm, dict(changes)

    def prepare(self, model: nn.Module) -> list[tuple[kfac.Target, Tensor]]:
        """Return each target with its trained weight (out, in)."""
        targets = kfac.named_targets(model, self.changes)
        return [(target, target.weight + self.changes[target.name]) for target in targets]

    def describe(self) -> dict[str, Any]:
        """Return kind, arm and a digest of the changes."""
        digests = [kfac.weight_digest(one) for one in self.changes.values()]
        return {"kind": self.kind, "arm": self.arm, "changes": digests}


def new_facts(language: Language, n: int, seed: int) -> list[tuple[str, str]]:
    """Questions about n strangers, one fact each, and their answers."""
    rng, known, found = Random(f"new facts {language.seed} {seed}"), set(language.known), []
    for _ in range(n):
        person, attribute = stranger(rng, frozenset(known)), rng.choice(ATTRIBUTES)
        known.add(person)
        found.append((attribute.question.format(person), rng.choice(attribute.values)))
    return found


def halves(factors: kfac.Factors) -> dict[str, float]:
    """The keep of each target at which half of its pairs are sharp and half are flat."""
    keeps = {}
    for name in factors.names:
        mass = factors.curvature(name).mass().flatten().sort(descending=True).values
        keeps[name] = min(1.0, float(mass[: len(mass) // 2].sum() / mass.sum()))
    return keeps


def teach(
    lm: LanguageModel,
    factors: kfac.Factors,
    keeps: Mapping[str, float],
    facts: Sequence[tuple[str, str]],
    arm: str,
    lr: float,
    seed: int,
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Train copies of the targets with AdamW until the facts are known.

    Returns the change of each target (out, in), and what the run was like.
    """
    batches = [_labelled(lm, facts[i : i + BATCH]) for i in range(0, len(facts), BATCH)]
    targets = factors.targets(lm.model)
    weights = [target.parameter for target in targets]
    starts = [target.weight.clone() for target in targets]
    optimizer = torch.optim.AdamW(weights, lr=lr, weight_decay=0.0)
    rng, known, epoch = Random(f"order {seed}"), 0.0, 0
    began = time.process_time()
    projected = nullcontext() if arm == "free" else kfac.projected_training(
        lm.model, factors, keeps, onto=arm, seed=seed
    )  # fmt: skip
    with trainable(lm.model, weights):
        with projected, tqdm(total=len(facts), desc=f"{arm}: facts known", disable=None) as bar:
            while known < TAUGHT and epoch < MOST_EPOCHS:
                hits = 0  # before the step of each batch: the facts are known at least so well
                for batch in rng.sample(batches, len(batches)):
                    optimizer.zero_grad()
                    output = lm.model(**batch)
                    hits += _known(output.logits.detach(), batch["labels"])
                    output.loss.backward()
                    checked_step(lm.model, optimizer, f"arm {arm!r}, epoch {epoch}", "lower --lr")
                epoch, known = epoch + 1, hits / len(facts)
                bar.n = hits
                bar.set_postfix_str(f"epoch {epoch}")
        trained = {target.name: target.weight.clone() for target in targets}
    changes = {t.name: trained[t.name] - start for t, start in zip(targets, starts, strict=True)}
    inside = kfac.project(factors, dict(keeps), changes)
    size, flat = (
        sum(float(one.square().sum()) for one in each.values()) for each in (changes, inside)
    )
    cost = sum(
        0.5 * float((factors.G(name).double() @ one @ factors.A(name).double() * one).sum())
        for name, one in ((name, one.double()) for name, one in changes.items())
    )
    record = {
        "epochs": epoch,
        "steps": epoch * len(batches),
        "known": known,
        "cpu_seconds": time.process_time() - began,
        "norm": size**0.5,
        "flat_share": flat / size,
        "predicted_nats_per_token": cost,
    }
    return changes, record


def edited(
    lm: LanguageModel, language: Language, arm: str, names: Sequence[str], tasks: Sequence[Any]
) -> dict[str, Any]:
    """Edit a model at the wanted rise in perplexity; what is left of each task's score."""
    targets = kfac.named_targets(lm.model, names)
    factors = kfac.collect(
        lm, training_texts(language, TEXTS // 2, seed=1), targets, progress=False
    )
    ids = lm.encode(language.texts("validation", 40))
    before = perplexity(lm, ids, None)
    low, high, best = (
        *REMOVED,
        None,
    )  # the share of the mass that is removed, on a logarithmic scale
    for _ in range(BISECTIONS):
        middle = (low * high) ** 0.5
        edit = kfac.CurvatureEdit(factors, 1 - middle)
        reached = perplexity(lm, ids, edit)
        if best is None or abs(reached - RISE * before) < abs(best[1] - RISE * before):
            best = (edit, reached)
        low, high = (low, middle) if reached > RISE * before else (middle, high)
    assert best is not None
    comparison = lirefs.compare(lm, {"K-FAC": best[0]}, tasks, title=f"edit of {arm}")
    scores = {
        variant: [item.scores["accuracy"] for item in comparison.results[variant][NEW]]
        for variant in comparison.variants
    }
    return {
        "keep": best[0].keep,
        "rise": best[1] / before,
        "tasks": _cells(comparison, "K-FAC"),
        "new": scores,
    }


def _labelled(lm: LanguageModel, facts: Sequence[tuple[str, str]]) -> dict[str, Tensor]:
    """A batch whose labels mark the answers and their full stops."""
    prompts = lm.encode([question for question, _ in facts])
    texts = lm.encode([f"{question} {answer}." for question, answer in facts])
    batch = lm.pad(texts, side="right")
    labels = torch.full_like(batch["input_ids"], -100)
    for row, (prompt, text) in enumerate(zip(prompts, texts, strict=True)):
        labels[row, len(prompt) : len(text)] = batch["input_ids"][row, len(prompt) : len(text)]
    return {**batch, "labels": labels}


def _known(logits: Tensor, labels: Tensor) -> int:
    """Number of rows whose labels are all the likeliest tokens."""
    hits = (logits[:, :-1].argmax(-1) == labels[:, 1:]) | (labels[:, 1:] == -100)
    return int(hits.all(1).sum())


def _cells(comparison: Comparison, variant: str) -> dict[str, dict[str, Any]]:
    found = {}
    for task in comparison.tasks:
        cell = comparison.cell(variant, task)
        assert cell.difference is not None
        found[task] = {
            "value": cell.value.to_dict(),
            "difference": cell.difference.to_dict(),
            "p_holm": cell.p_holm,
        }
    return found


def _table(results: Mapping[str, Any]) -> str:
    """The results as Markdown: costs, then what the edit leaves."""
    arms = list(results["arms"])
    lines = ["| cost against the unchanged model | unchanged | " + " | ".join(arms) + " |"]
    lines.append("|---" * (len(arms) + 2) + "|")
    for task, start in results["unchanged"].items():
        cells = [_shown(results["cost"][arm][task]["difference"]) for arm in arms]
        lines.append(f"| {task} | {start['value']:.3f} | " + " | ".join(cells) + " |")
    for key in ("steps", "known", "norm", "flat_share", "predicted_nats_per_token"):
        cells = [f"{results['arms'][arm][key]:.4g}" for arm in arms]
        lines.append(f"| {key.replace('_', ' ')} | | " + " | ".join(cells) + " |")
    lines += ["", "| after the edit, against before it | " + " | ".join(arms) + " |"]
    lines.append("|---" * (len(arms) + 1) + "|")
    for task in next(iter(results["edits"].values()))["tasks"]:
        cells = [_shown(results["edits"][arm]["tasks"][task]["difference"]) for arm in arms]
        lines.append(f"| {task} | " + " | ".join(cells) + " |")
    cells = [_shown(results["removed_against_free"].get(arm)) for arm in arms]
    lines.append("| new facts, change against that of free | " + " | ".join(cells) + " |")
    for key in ("keep", "rise"):
        cells = [f"{results['edits'][arm][key]:.4f}" for arm in arms]
        lines.append(f"| {key} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _shown(one: Mapping[str, float] | None) -> str:
    return "" if one is None else f"{one['value']:+.3f} [{one['low']:+.3f}, {one['high']:+.3f}]"


def _figure(results: Mapping[str, Any]) -> Any:
    """Costs of each arm, task by task, with paired intervals."""
    canvas, (axis,) = canvas_of(1, (8.5, 5.0))
    tasks = [task for task in results["unchanged"] if task not in (NEW, "stories")]
    for index, arm in enumerate(results["arms"]):
        cells = [Estimate(**results["cost"][arm][task]["difference"]) for task in tasks]
        axis.errorbar(
            [one.value for one in cells],
            [place + 0.18 * (index - 1.5) for place in range(len(tasks))],
            xerr=[
                [one.value - one.low for one in cells],
                [one.high - one.value for one in cells],
            ],
            fmt="osD^"[index],
            color=COLOURS[index],
            ms=4,
            lw=1,
            label=arm,
        )
    axis.set_yticks(range(len(tasks)), tasks)
    axis.invert_yaxis()
    axis.axvline(0, color="black", lw=0.6)
    axis.set(xlabel="score after writing the new facts, minus before")
    axis.legend(frameon=False)
    return picture_of(canvas)


def run(out: Path, n: int, limit: int, lr: float, seed: int) -> dict[str, Any]:
    """Run or continue the experiment in a folder; its results, which are also written there."""
    settings = {"facts": n, "limit": limit, "lr": lr, "seed": seed, "taught": TAUGHT, "rise": RISE}
    known = out / "settings.json"
    figures = ("write_flat.png", "write_flat.svg")
    refuse_foreign(known, '"taught"', ("results.json", "table.md", *figures))
    if known.exists() and parse_json(known.read_text("utf-8")) != settings:
        raise SettingError(f"{out} holds a run with other settings; give another --out")
    atomic_write_text(known, json.dumps(settings))
    lm, language = lirefs.load("organism"), Language()
    facts = new_facts(language, n, seed)
    targets = kfac.find_targets(lm.model, projections="mlp")
    factors = kfac.collect(lm, training_texts(language, TEXTS, seed), targets)
    keeps = halves(factors)
    items = [(f"new-{number}", *fact) for number, fact in enumerate(facts)]
    tasks = [
        ShortAnswer(NEW, [(key, question, [answer]) for key, question, answer in items]),
        *(one for one in organism_tasks(lm, language, "test", limit) if one.name in TASKS),
    ]
    written, records = {}, {}
    for arm in ARMS:
        path = out / f"{arm}.safetensors"
        if not path.exists():
            changes, record = teach(lm, factors, keeps, facts, arm, lr, seed)
            write_tensors(path, changes, {HEADER: json.dumps(record)})
        records[arm], changes = read_tensors(path, HEADER, "written weights")
        written[arm] = Written(arm, changes)
    comparison = lirefs.compare(lm, written, tasks, journal=out / "journal")
    edits = {}
    kept = [task for task in tasks if task.name in (NEW, "common facts", "rare facts", "stories")]
    for arm in ARMS:
        path = out / f"edit-{arm}.json"
        if not path.exists():
            changed = lirefs.load("organism")
            written[arm].bake(changed.model)
            found = edited(changed, language, arm, factors.names, kept)
            atomic_write_text(path, json.dumps(found))
        edits[arm] = parse_json(path.read_text("utf-8"))
    results = {
        "settings": settings,
        "arms": records,
        "unchanged": {
            task: comparison.cell("unchanged", task).value.to_dict() for task in comparison.tasks
        },
        "cost": {arm: _cells(comparison, arm) for arm in ARMS},
        "edits": edits,
        "removed_against_free": _against_free(edits, seed),
    }
    atomic_write_text(out / "results.json", json.dumps(results, indent=1))
    atomic_write_text(out / "table.md", _table(results))
    _figure(results).save(out, "write_flat")
    return results


def _against_free(edits: Mapping[str, Any], seed: int) -> dict[str, dict[str, float]]:
    """How the edit changes the new facts of an arm, minus how it changes those of free writing."""
    from lirefs.statistics.resamples import Resamples

    changes = {
        arm: torch.tensor(one["new"]["K-FAC"]) - torch.tensor(one["new"]["unchanged"])
        for arm, one in edits.items()
    }
    free = changes["free"].double().numpy()
    draws = Resamples(len(free), 5000, seed)
    return {
        arm: paired_difference(one.double().numpy(), free, draws).to_dict()
        for arm, one in changes.items()
        if arm != "free"
    }


def main() -> None:
    """Parse the arguments, run, and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--out", type=Path, default=Path("write_flat"), help="folder of the results"
    )
    parser.add_argument("--facts", type=int, default=500, help="new facts")
    parser.add_argument("--limit", type=int, default=60, help="items per task")
    parser.add_argument("--lr", type=float, default=1e-3, help="AdamW's learning rate")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    run(options.out, options.facts, options.limit, options.lr, options.seed)
    print((options.out / "table.md").read_text("utf-8"))


if __name__ == "__main__":
    main()
