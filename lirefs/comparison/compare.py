"""Run tasks on a model under interventions."""

from __future__ import annotations

import json
import platform
import shlex
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from datetime import UTC, datetime
from functools import partial
from importlib import metadata
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm.auto import tqdm

from lirefs.comparison.cell import Cell, TaskInfo
from lirefs.comparison.comparison import BASELINE, Comparison
from lirefs.comparison.journal import Journal, part_key, task_digest, task_parts, task_texts
from lirefs.comparison.results_file import MOST_RESAMPLES
from lirefs.errors import (
    InterventionError,
    SettingError,
    TaskError,
    as_list,
    checked_seed,
    got,
    must_be,
    whole_number,
)
from lirefs.model.identity import first_difference, must_be_told_apart, parts_of
from lirefs.model.intervention import (
    Intervention,
    applied,
    compose,
    is_hand_written,
    must_be_intervention,
)
from lirefs.model.language_model import LanguageModel
from lirefs.model.processes.world import together
from lirefs.model.prompts import Prompted
from lirefs.model.weight_swap import fsdp_modules
from lirefs.tasks.batches.lower_blocks import LowerBlocks
from lirefs.tasks.default_suite import default_tasks
from lirefs.tasks.inference import NOT_ON_ENGINE, Engine, generating_on
from lirefs.tasks.items import ItemTask
from lirefs.tasks.task import ItemResult, Task
from lirefs.version import __version__

UNPROMPTED = (
    "this task does not ask the model by the functions of lirefs.tasks (greedy, token_nlls, "
    "score_continuations), so a Prompted cannot be put before its items; leave out one of the two"
)


def compare(
    lm: LanguageModel,
    interventions: Mapping[str, Intervention],
    tasks: Sequence[Task] | None = None,
    *,
    resamples: int = 5000,
    seed: int = 0,
    provenance: Mapping[str, Any] | None = None,
    journal: str | Path | None = None,
    progress: bool = True,
    title: str = "",
    notes: Sequence[str] = (),
    callback: Callable[[Cell], object] | None = None,
    engine: Engine | None = None,
) -> Comparison:
    """Run tasks on the unchanged model and under each intervention, on the same items.

    Where `torch.distributed` is running, each process takes a share of the items and returns the
    whole comparison.

    Args:
        lm: The model.
        interventions: Name to intervention, which may be a `Prompted`; the unchanged model is added
            under `unchanged`. `{}` scores the unchanged model alone. Each is attached and removed
            once before the first task runs, so that one that does not fit is noticed before hours
            of work.
        tasks: What to run; None for `default_tasks()`.
        resamples: Bootstrap resamples of the paired intervals.
        seed: Seed of the bootstrap.
        provenance: Settings to save with the results.
        journal: Folder that keeps finished items until you remove it, so that the same call
            resumes after an interruption, with the same result. The model is recognized by
            `lm.identity`, an intervention by its name and its `describe`. Of several processes
            each may have a folder of its own.
        progress: Show a progress bar.
        title: Heading of the report; empty for one that names the model.
        notes: Sentences for the top of the report: what was asked, and what you found.
        callback: Called with each finished cell, for logging. Its `p_holm` is None: the adjustment
            needs all cells. Where `torch.distributed` is running, the first process calls it, once
            all have finished.
        engine: Another runtime of the same model, which generates the answers, such as
            `lirefs.export.vllm.Engine(llm)`; `lm` encodes and reads them, and puts a `Prompted`
            before them. Tasks that do not say `generates = True`, such as those that score
            likelihoods, are refused.

    Returns:
        Every variant on every task, item by item.

    Raises:
        TaskError: No task, two share a name, an item is longer than the model's positions, a
            variant is called `unchanged`, a task cannot run on the engine, or one of a class of
            your own asks the model in a way that a `Prompted` does not reach.
        InterventionError: If an intervention does not fit the model, or is none; or one of a class
            of your own leaves a weight, hook or forward method changed, or describes itself by
            anything but a dict of JSON values.
        DistributedError: The processes differ in model, tokenizer, variants, tasks, items, seed or
            versions, or another process failed.
        SettingError: If the journal is a file, `resamples` is out of range, or an argument has the
            wrong type.
        ProvenanceError: With a journal, if the model has no identity (a weight is offloaded, or a
            hook of your own may change it), or an intervention cannot be told from others.

    Examples:
        Does the model read a passage that contradicts what it has memorized?

        >>> import lirefs
        >>> lm, language = lirefs.load("organism"), lirefs.organism.Language()
        >>> questions = lirefs.load_questions("organism")
        >>> direction = lirefs.fit(lm, questions, layers=[1], progress=False).best
        >>> variants = {
        ...     name: lirefs.Steer(one, "add", 2.0, scope="last_prompt_token")
        ...     for name, one in {
        ...         "LiReF": direction, "random direction": direction.random_like(seed=0)
        ...     }.items()
        ... }
        >>> conflicts = language.items("conflict", "test", 20)
        >>> rows = [(item.prompt, item.prompt, item.answer) for item in conflicts]
        >>> task = lirefs.ShortAnswer("conflicts", rows, max_new_tokens=1)
        >>> comparison = lirefs.compare(lm, variants, [task], progress=False)
        >>> for variant in comparison.variants:
        ...     print(f"{variant}: {comparison.cell(variant, 'conflicts').value:.2f}")
        unchanged: 0.45 [0.26, 0.66]
        LiReF: 0.80 [0.58, 0.92]
        random direction: 0.60 [0.39, 0.78]
    """
    with together("lirefs.compare") as world:
        must_be(lm, LanguageModel, "lm")
        must_be(interventions, Mapping, "interventions")
        must_be(title, str, "title")
        notes = as_list(notes, "notes", str)
        if callback is not None and not callable(callback):
            raise SettingError(f"callback must be a function of a cell, got {got(callback)}")
        started, clock = datetime.now(UTC), time.monotonic()
        for name, one in interventions.items():
            must_be(name, str, "the name of an intervention")
            must_be_intervention(one, f"interventions[{name!r}]")
        if not 1 <= whole_number(resamples, "resamples") <= MOST_RESAMPLES:
            raise SettingError(f"resamples is {resamples}, expected 1 to {MOST_RESAMPLES}")
        seed = checked_seed(seed)
        tasks = default_tasks(lm) if tasks is None else as_list(tasks, "tasks", error=TaskError)
        for index, task in enumerate(tasks):
            if not all(hasattr(task, part) for part in ("name", "items", "run")):
                raise TaskError(f"tasks[{index}] must be a task, got {got(task)}")
            for part in ("group", "metric", "chance", "subset"):
                if not hasattr(task, part):
                    raise TaskError(f"task {task.name!r} has no {part}, see `lirefs.tasks.Task`")
        if not tasks:
            raise TaskError("no tasks to compare on")
        names = [task.name for task in tasks]
        if len(set(names)) < len(names):
            raise TaskError(f"two tasks share a name: {', '.join(sorted(names))}")
        if BASELINE in interventions:
            raise TaskError(f"{BASELINE!r} is the name of the unchanged model; rename the variant")
        variants: dict[str, Intervention | None] = {BASELINE: None, **interventions}
        described = {name: _description(name, one) for name, one in interventions.items()}
        hand_written = {name for name, one in interventions.items() if is_hand_written(one)}
        before = parts_of(lm.model) if hand_written else {}
        if engine is not None:
            for task in tasks:
                if not getattr(task, "generates", False):
                    raise TaskError(f"{task.name}: {NOT_ON_ENGINE}")
            engine.check(lm)

        lower = LowerBlocks(lm)
        for name, trial in variants.items():  # all are tried before hours of work begin
            with applied(trial, lm.model):
                lower.expect(trial)
                for task in tasks if trial is None or _prompts(trial) else ():
                    if isinstance(task, ItemTask):
                        task.encoded(lm)  # raises an error if an item is too long
            if engine is not None:
                with _changed(lm, trial, engine):
                    pass
            if name in hand_written:
                _must_be_restored(name, lm, before)
        kept = Journal(journal, world)
        if world.size > 1 and fsdp_modules(lm.model):
            raise SettingError(
                "the model is sharded over the processes (FSDP2), so all run each of its passes, "
                "but a comparison gives each process its own items; load the whole model in each, "
                "or in one"
            )
        made_on = lm.provenance
        if journal is not None:
            made_on["identity"] = lm.identity
            for name, settings in described.items():
                must_be_told_apart(settings, f"the intervention {name!r}")
        runtime = {} if engine is None else {"engine": engine.describe()}
        made_by = made_on.get("identity", "") + (json.dumps(runtime) if runtime else "")
        digest_of = partial(task_digest, made_by, lm)
        rows = {task.name: task_parts(task) for task in tasks}
        if world.size > 1:
            settings = {"engine": runtime, "seed": seed, "resamples": resamples}
            world.agree(settings | _what_decides(lm, made_on, tasks, described))
        pieces = {
            task.name: [(digest_of(piece), piece) for piece in map(task.subset, rows[task.name])]
            for task in tasks
        }

        def keyed(variant: str, name: str) -> list[tuple[str, Task]]:
            settings = described.get(variant)
            return [(part_key(digest, variant, settings), piece) for digest, piece in pieces[name]]

        def collected(variant: str, name: str) -> list[ItemResult]:
            found = [kept.finished(key, piece) or [] for key, piece in keyed(variant, name)]
            placed = dict(zip(chain(*rows[name]), chain(*found), strict=True))
            return [placed[row] for row in range(len(placed))]

        kept.share_out(
            part for variant in variants for name in names for part in keyed(variant, name)
        )
        infos = {task.name: TaskInfo(task.group, task.metric, task.chance) for task in tasks}

        def tell(variant: str, name: str) -> None:
            if callback is not None and world.rank == 0:
                results = {one: {name: collected(one, name)} for one in (BASELINE, variant)}
                so_far = Comparison(results, infos, resamples=resamples, seed=seed)
                callback(so_far.unadjusted_cell(variant, name))

        total = len(variants) * sum(len(task) for task in tasks)
        with tqdm(total=total, unit="item", desc="compare", disable=not progress or None) as bar:

            def advance(items: int) -> None:
                world.check()
                bar.update(items)

            for variant, intervention in variants.items():
                prompts = _prompts(intervention)
                with _changed(lm, intervention, engine), generating_on(engine):
                    for name in names:
                        bar.set_postfix_str(f"{variant}: {name}")
                        for key, piece in keyed(variant, name):
                            if not kept.mine(key):
                                bar.update(len(piece))
                                continue
                            reached = sum(one.prompts_reached for one in prompts)
                            # A task of somebody else's may change the model itself.
                            own = is_hand_written(piece)
                            with nullcontext() if own else lower.under(intervention):
                                found = piece.run(lm, advance)
                            if prompts and sum(one.prompts_reached for one in prompts) == reached:
                                raise TaskError(f"{name}: {UNPROMPTED}")
                            kept.add(key, found)
                        if world.size == 1:
                            tell(variant, name)
                if variant in hand_written:
                    _must_be_restored(variant, lm, before)
        kept.exchange()
        if world.size > 1:
            for variant in variants:
                for name in names:
                    tell(variant, name)
        return Comparison(
            results={v: {name: collected(v, name) for name in names} for v in variants},
            tasks=infos,
            provenance={
                "lirefs": __version__,
                **made_on,
                "device": str(lm.device),
                **runtime,
                "environment": {
                    "python": platform.python_version(),
                    "platform": platform.platform(),
                    **{one: metadata.version(one) for one in ("torch", "transformers", "numpy")},
                    "threads": torch.get_num_threads(),
                },
                "tasks": {task.name: digest_of(task) for task in tasks},
                "interventions": described,
                **(provenance or {}),
            },
            resamples=resamples,
            seed=seed,
            title=title,
            notes=tuple(notes),
            run={
                "started": started.isoformat(timespec="seconds"),
                "seconds": round(time.monotonic() - clock, 1),
                "command": command_line(),
                "resumed": kept.resumed,
            },
        )


def _what_decides(
    lm: LanguageModel,
    made_on: Mapping[str, str],
    tasks: Sequence[Task],
    described: Mapping[str, Mapping[str, Any]],
) -> dict[str, Any]:
    """What decides the results, by its name in messages."""
    settings = {name: json.dumps(one, default=str) for name, one in described.items()}
    texts = {task.name: task_texts(task) for task in tasks}
    return {
        "lirefs": __version__,
        "model": made_on.get("identity", made_on.get("model", "unknown")),
        "tokenizer": made_on["tokenizer"],
        "device": lm.device.type,
        "order of variants": list(described),
        "order of tasks": list(texts),
        **{f"variant {name!r}": one for name, one in settings.items()},
        **{f"task {name!r}": what for name, (what, _) in texts.items()},
        **{f"items of task {name!r}": items for name, (_, items) in texts.items()},
    }


def _prompts(intervention: Intervention | None) -> list[Prompted]:
    """The parts of an intervention that are put before prompts."""
    members = () if intervention is None else compose(intervention).members
    return [one for one in members if isinstance(one, Prompted)]


@contextmanager
def _changed(
    lm: LanguageModel, intervention: Intervention | None, engine: Engine | None
) -> Iterator[None]:
    """The model or the engine under an intervention; what either is asked, `lm` prompts."""
    with ExitStack() as stack:
        if intervention is None or engine is None:
            stack.enter_context(applied(intervention, lm.model))
        else:
            members = compose(intervention).members
            for one in members:
                if isinstance(one, Prompted):
                    stack.enter_context(one.apply(lm.model))
            if others := [one for one in members if not isinstance(one, Prompted)]:
                stack.enter_context(
                    engine.steered(others[0] if len(others) == 1 else compose(*others))
                )
        yield


def _description(name: str, intervention: Intervention) -> Mapping[str, Any]:
    """What an intervention says of itself; InterventionError unless it is a dict of JSON values."""
    described = intervention.describe()
    whose = f"interventions[{name!r}]: describe()"
    if not isinstance(described, Mapping):
        raise InterventionError(
            f'{whose} must return a dict, such as {{"kind": "my method", "strength": 1.0}}, got '
            f"{got(described)}"
        )
    try:
        json.dumps(described, default=_number)
    except (TypeError, ValueError) as problem:
        raise InterventionError(
            f"{whose} must return JSON values (texts, numbers, lists, dicts): {problem}"
        ) from None
    return described


def _number(value: Any) -> Any:
    if isinstance(value, np.generic):
        return value.item()
    raise TypeError(f"{type(value).__name__} is not JSON")


def _must_be_restored(name: str, lm: LanguageModel, before: Mapping[str, Any]) -> None:
    """Raise InterventionError if the model is not what it was before a variant."""
    if lost := first_difference(before, parts_of(lm.model)):
        raise InterventionError(
            f"interventions[{name!r}] did not restore the model when it was removed: {lost} is not "
            "what it was before; remove() of the handle must undo all that attach does (copy a "
            "weight before you change it, and copy it back). The model is still changed: load it "
            "again"
        )


def command_line() -> str:
    """The whole line of a `lirefs` command; of another program its name alone.

    What others are called with may hold a password, and is not ours to publish.
    """
    program, *arguments = sys.argv or [""]
    path = Path(program)
    if path.name == "__main__.py" and path.parent.name == "lirefs":
        path = path.parent  # python -m lirefs
    return shlex.join([path.name, *arguments]) if path.name == "lirefs" else path.name
