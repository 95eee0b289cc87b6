"""Directions and curvature of one model, each measured by the other.

Hong et al. 2025 and Merullo et al. 2025 both order tasks from recitation to reasoning. Neither asks
whether the two orders are the same.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from scipy.stats import rankdata

import kfac
import lirefs
from experiments.sharpness import DRAWS, states_at
from experiments.spectra_plots import TaskPosition, two_sided_spectrum
from lirefs import Direction, Intervention, LanguageModel, Questions, Recitation, Steer
from lirefs.errors import DirectionError, TaskError
from lirefs.model import applied
from lirefs.organism import Language, organism_questions, organism_tasks, training_texts
from lirefs.statistics import Estimate, Resamples, auroc, correlation, interval, permutation_p
from lirefs.statistics.intervals import Floats
from lirefs.tasks import Task

BATCH_TOKENS = 4096
RESAMPLES = 2000


@dataclass(frozen=True)
class TaskSpectrum:
    """Tasks measured by their activations and by their curvature.

    Attributes:
        positions: One entry for each task.
        spearman: Rank correlation of the two over tasks; n is the number of tasks.
        p_value: Share of random orders of the tasks whose correlation is at least as far from 0.
        random: Absolute correlation with random directions at the same layer and site: mean and
            95 % range. Tasks differ along any direction, so compare with this and not with 0.
        above_random: Share of random directions whose absolute correlation is smaller.
    """

    positions: tuple[TaskPosition, ...]
    spearman: Estimate
    p_value: float
    random: Estimate
    above_random: float


@dataclass(frozen=True)
class Move:
    """How an intervention moves questions along a direction.

    Attributes:
        memory: Change in the mean projection of memory questions, in class distances.
        reasoning: The same for reasoning questions.
        auroc_before: How well the projection separates the classes without the intervention.
        auroc_after: How well it separates them with the intervention.
    """

    memory: Estimate
    reasoning: Estimate
    auroc_before: Estimate
    auroc_after: Estimate


def task_positions(
    lm: LanguageModel,
    direction: Direction,
    factors: kfac.Factors,
    tasks: Sequence[Task],
    *,
    flat: float = 0.6,
    seed: int = 0,
) -> TaskSpectrum:
    """Place tasks by their projection on a LiReF and by their input energy in flat directions.

    The projection is that of the last prompt token. The energy is that of all prompt tokens; for
    recitation, of the whole recited text. Intervals resample items.

    Args:
        lm: The model.
        direction: A fitted direction, preferably of a middle layer.
        factors: Curvature of the same model.
        tasks: At least three tasks with texts or token ids as prompts. Tasks with the same prompts
            (one for each of two competing answers) are one point: only the first is used.
        flat: Share of input directions that counts as flat.
        seed: Seed of intervals and random directions.

    Raises:
        TaskError: If there are fewer than three tasks, or one has no prompts.
        DirectionError: If the direction was not fitted on two classes.
    """
    noise = np.random.default_rng(seed).normal(size=(lm.width, DRAWS))
    positions, projected = [], []
    for task, prompts, texts in _distinct(lm, tasks):
        states = states_at(lm, direction, prompts)
        batches = lm.batches(sorted(texts, key=len, reverse=True), BATCH_TOKENS)  # little padding
        scores = kfac.flat_shares(lm.model, batches, factors, flat=flat)
        positions.append(
            TaskPosition(
                task.name,
                task.group,
                _mean(_projections(direction, states), seed),
                _mean(scores.passages, seed),
            )
        )
        projected.append(states.mean(axis=0) @ noise)
    if len(positions) < 3:
        raise TaskError(f"{len(positions)} task(s) are too few for an order; give at least three")
    along = np.array([one.projection.value for one in positions])
    energy = np.array([one.flat.value for one in positions])
    found = correlation(along, energy, ranks=True)
    ranks = [rankdata(one, axis=0) for one in (np.array(projected), energy)]
    centred = [one - one.mean(axis=0) for one in ranks]
    sizes = np.linalg.norm(centred[0], axis=0) * np.linalg.norm(centred[1])
    random = np.abs(centred[1] @ centred[0]) / sizes
    return TaskSpectrum(
        positions=tuple(positions),
        spearman=found,
        p_value=permutation_p(along, energy, seed=seed),
        random=Estimate(float(random.mean()), *interval(random), DRAWS),
        above_random=float((random < abs(found.value) - 1e-9).mean()),
    )


def edit_moves_projection(
    lm: LanguageModel,
    direction: Direction,
    edit: kfac.CurvatureEdit,
    questions: Questions,
    *,
    seed: int = 0,
) -> dict[str, Move]:
    """Measure whether a curvature edit moves questions along a LiReF.

    Args:
        lm: The model, unedited.
        direction: A fitted direction of a layer after the edited ones; an edit of later layers
            moves nothing.
        edit: The edit.
        questions: Questions of both classes that were not used for fitting.
        seed: Seed of the control and the intervals.

    Returns:
        A move for `edit`, and one for its control `random pairs`, which keeps as many pairs, chosen
        at random.

    Raises:
        DirectionError: If the direction was not fitted on two classes.
    """
    labels = np.array(questions.labels)
    before = _projections(direction, states_at(lm, direction, questions.prompts))
    control = kfac.RandomPairsEdit(edit.factors, edit.keep, seed=seed)
    moves = {}
    for name, one in (("edit", edit), ("random pairs", control)):
        with applied(one, lm.model):
            after = _projections(direction, states_at(lm, direction, questions.prompts))
        memory, reasoning = (_mean((after - before)[labels == label], seed) for label in (0, 1))
        moves[name] = Move(memory, reasoning, auroc(before, labels), auroc(after, labels))
    return moves


def edit_and_steer(
    edit: Intervention, direction: Direction, strength: float, *, scope: str = "all", seed: int = 0
) -> dict[str, Intervention]:
    """Variants for `lirefs.compare` that show whether steering adds anything to an edit.

    Args:
        edit: A weight edit.
        direction: The direction to add.
        strength: Factor of the direction.
        scope: Which tokens to steer.
        seed: Seed of the random direction.

    Returns:
        `edit`, `edit + steer`, `edit + random direction` (of the same norm) and `steer`.
    """
    steer = Steer(direction, "add", strength, scope=scope)
    random = Steer(direction.random_like(seed), "add", strength, scope=scope)
    return {
        "edit": edit,
        "edit + steer": steer + edit,
        "edit + random direction": random + edit,
        "steer": steer,
    }


def _prompts(lm: LanguageModel, task: Task) -> tuple[list[list[int]], list[list[int]]]:
    """Token ids of a task's prompts, and of the texts whose energy is measured."""
    items = getattr(task, "items", ())
    if isinstance(task, Recitation):
        prompts = [list(prefix) for _, prefix, _ in task.items]
        return prompts, [[*prefix, *suffix] for _, prefix, suffix in task.items]
    texts = [item[1] for item in items if not isinstance(item, Mapping) and len(item) > 1]
    if not texts or not all(isinstance(text, str) for text in texts):
        raise TaskError(f"task {task.name!r} has no items of the form (id, prompt, ...)")
    ids = lm.encode(texts)
    return ids, ids


def _distinct(
    lm: LanguageModel, tasks: Sequence[Task]
) -> Iterator[tuple[Task, list[list[int]], list[list[int]]]]:
    """Tasks with their prompts and texts; tasks that repeat the prompts of another are skipped."""
    known: list[list[list[int]]] = []
    for task in tasks:
        prompts, texts = _prompts(lm, task)
        if prompts not in known:
            known.append(prompts)
            yield task, prompts, texts


def _projections(direction: Direction, states: Floats) -> Floats:
    """From -0.5 at the mean of the memory class to 0.5 at that of the reasoning class."""
    memory, reasoning = direction.means
    if memory == reasoning:
        raise DirectionError("the direction has no class means; use a fitted direction")
    along: Floats = states @ direction.unit.double().cpu().numpy()
    return (along - (memory + reasoning) / 2) / (reasoning - memory)


def _mean(values: Floats, seed: int) -> Estimate:
    draws = Resamples(len(values), RESAMPLES, seed)
    return Estimate(float(values.mean()), *interval(draws @ values / len(values)), len(values))


def main() -> None:
    """Measure the spectrum from recitation to reasoning, in activations and in curvature."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--model", default="organism", help="built-in name, hub id or folder")
    parser.add_argument("--limit", type=int, default=40, help="items per task")
    parser.add_argument("--out", type=Path, default=Path("spectra"), help="folder for the figure")
    options = parser.parse_args()

    lm, language, limit = lirefs.load(options.model), Language(), options.limit
    if options.model == "organism":
        questions = organism_questions("passage", language, 20 + limit)
        tasks = organism_tasks(lm, language, "test", limit)
        texts = training_texts(language, 5 * limit)
        edited, keep = 0, 0.98
    else:
        questions = lirefs.load_questions("default")
        tasks, texts = lirefs.default_tasks(lm, limit=limit), lirefs.calibration_texts()[:limit]
        edited, keep = lm.n_layers // 3, 0.8
    split = questions.split()
    direction = lirefs.fit(lm, split).best
    layers = {edited, max(direction.layer - 1, 0), direction.layer}
    targets = kfac.find_targets(lm.model, layers, ["gate_proj", "up_proj", "down_proj", "o_proj"])
    factors = kfac.collect(lm, texts, targets)
    names = [target.name for target in kfac.find_targets(lm.model, [edited])]
    edit = kfac.CurvatureEdit(factors, dict.fromkeys(names, keep))

    found = task_positions(lm, direction, factors, tasks)
    title = f"layer {direction.layer}: Spearman {found.spearman:.2f}, n = {found.spearman.n} tasks"
    two_sided_spectrum(found.positions, f"{lm.name}, {title}").save(options.out, "spectra")
    print(
        f"{title}, p = {found.p_value:.3f}; absolute value for random directions "
        f"{found.random:.2f}, smaller for {found.above_random:.0%} of them"
    )
    for one in found.positions:
        print(f"{one.task:28s} projection {one.projection:.2f}, flat {one.flat}")

    for name, move in edit_moves_projection(lm, direction, edit, split.test).items():
        print(f"{name}: memory {move.memory:+.2f}, reasoning {move.reasoning:+.2f}, ", end="")
        print(f"AUROC {move.auroc_before:.2f}, then {move.auroc_after:.2f}")
    few = [task for task in tasks if task.group in ("memorization", "conflict", "language")]
    comparison = lirefs.compare(lm, edit_and_steer(edit, direction, 2.0), few)
    print(f"{'':28s}" + "".join(f"{variant:>24s}" for variant in comparison.variants))
    for task in comparison.tasks:
        values = [comparison.cell(variant, task).value for variant in comparison.variants]
        print(f"{task:28s}" + "".join(f"{f'{value:.2f}':>24s}" for value in values))
    print(f"wrote {options.out / 'spectra.png'}")


if __name__ == "__main__":
    main()
