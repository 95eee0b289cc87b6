"""Scenarios of several processes that compare or collect together, for `test_crowds.py`.

Each is a function of rank and folder that all processes call. It asserts what its process sees.
"""

from __future__ import annotations

import importlib
import json
import logging
import os
import re
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from curvature_tools import assert_same, batch, llama
from journal_runs import tasks, variants
from rich.console import Console
from small_jobs import small_jobs, undrawn
from tiny import fresh_model, tiny_model, tiny_tokenizer

import kfac
import lirefs
from kfac.collection import passes
from kfac.collection.hooks import TargetTracker
from lirefs.comparison import journal
from lirefs.comparison.results_file import results_json
from lirefs.errors import DistributedError, ModelNotFoundError, SettingError
from lirefs.main_job import run
from lirefs.main_job.factors import factors_of
from lirefs.model.processes import heartbeat, world

BATCHES = [batch([0, 1]), batch([2]), batch([0, 4], "left", 1), batch([5]), batch([3])]
LONGEST_WAIT = 30.0

Scenario = Callable[[int, Path], None]
SCENARIOS: dict[str, Scenario] = {}


def scenario(function: Scenario) -> Scenario:
    SCENARIOS[function.__name__.replace("_", " ")] = function
    return function


def lm(model: Any = None) -> lirefs.LanguageModel:
    model = tiny_model("llama") if model is None else model
    return lirefs.wrap(model, tiny_tokenizer(), name="tiny")


def compared(some_tasks: Any = None, **options: Any) -> str:
    """A comparison as text; parts of four items, so that each process has several."""
    settings = {"on": lm(), "interventions": variants(), "progress": False} | options
    model, interventions = settings.pop("on"), settings.pop("interventions")
    some_tasks = tasks() if some_tasks is None else some_tasks
    with mock.patch.object(journal, "PART", 4):
        return results_json(lirefs.compare(model, interventions, some_tasks, **settings))


def collected(batches: Any = BATCHES, model: Any = None, **options: Any) -> kfac.Factors:
    model = llama(torch.float32) if model is None else model
    return kfac.collect(model, batches, **{"layers": [1], "progress": False} | options)


def both_differ(what: str) -> Any:
    """Both processes say that they differ in something, and with what."""
    return pytest.raises(DistributedError, match=rf"differ in {what} \(.* in process 0; .*1\)")


@contextmanager
def failing(rank: int, where: int, error: type[BaseException], said: str) -> Iterator[None]:
    """One process raises an error; the others hear of it within seconds."""
    expected = error if rank == where else DistributedError
    begun = time.monotonic()
    with pytest.raises(expected) as caught:
        yield
    assert time.monotonic() - begun < LONGEST_WAIT
    if rank != where:
        assert re.search(
            rf"process {where} failed with {error.__name__}.*{said}", str(caught.value)
        )


@contextmanager
def at_call(owner: Any, name: str, number: int, then: Callable[[], None]) -> Iterator[list[int]]:
    """Do something before one of the calls of a method, counted from 1."""
    original, calls = getattr(owner, name), []

    def counted(*args: Any, **kwargs: Any) -> Any:
        calls.append(len(calls) + 1)
        if len(calls) == number:
            then()
        return original(*args, **kwargs)

    with mock.patch.object(owner, name, counted):
        yield calls


def broken() -> None:
    raise ValueError("a broken item")


# What differs.


@scenario
def other_seeds(rank: int, folder: Path) -> None:
    with both_differ("seed"):
        compared(seed=rank)
    with both_differ("seed"):
        collected(seed=rank)


@scenario
def other_weights(rank: int, folder: Path) -> None:
    model, other = fresh_model("llama"), llama(torch.float32)
    with torch.no_grad():
        model.lm_head.weight[0, 0] += rank
        other.lm_head.weight[0, 0] += rank  # which is not a target
    with both_differ("model"):
        compared(on=lm(model))
    with both_differ("model"):
        collected(model=other)


@scenario
def other_targets(rank: int, folder: Path) -> None:
    with pytest.raises(DistributedError, match=r"model.layers.1.mlp.up_proj' \(.*; missing in pro"):
        collected(layers=[1, 0][rank:])


@scenario
def other_items(rank: int, folder: Path) -> None:
    choose, answer = tasks()
    fewer = replace(choose, items=choose.items[rank:])
    with both_differ("items of task 'choose'"):
        compared([fewer, answer])
    with both_differ("batches"):
        collected(BATCHES[rank:])


@scenario
def other_order_of_items(rank: int, folder: Path) -> None:
    choose, answer = tasks()
    turned = replace(choose, items=choose.items[:: 1 - 2 * rank])
    with both_differ("items of task 'choose'"):
        compared([turned, answer])
    with both_differ("batches"):
        collected(BATCHES[:: 1 - 2 * rank])
    with both_differ("order of tasks"):
        compared(tasks()[:: 1 - 2 * rank])


@scenario
def other_interventions(rank: int, folder: Path) -> None:
    given = variants()
    given["weak"] = lirefs.Steer(given["weak"].directions[0], "add", 1.0 + rank)
    with both_differ("variant 'weak'"):
        compared(interventions=given)


@scenario
def other_factors(rank: int, folder: Path) -> None:
    """Of which one corrects, or decomposes together."""
    with mock.patch.object(dist, "is_initialized", return_value=False):
        alone = collected(BATCHES[rank:])
    with both_differ("factor 'A.model.layers.1.mlp.gate_proj'"):
        kfac.correct(llama(torch.float32), BATCHES, alone, progress=False)
    with both_differ("factor 'A.model.layers.1.mlp.gate_proj'"):
        kfac.merge([alone]).decompose(spread=True, progress=False)


@scenario
def other_version_of_a_library(rank: int, folder: Path) -> None:
    with mock.patch.object(torch, "__version__", f"2.{rank}"), both_differ("torch"):
        compared()
    comparing = importlib.import_module("lirefs.comparison.compare")
    with mock.patch.object(comparing, "__version__", f"0.{rank}"), both_differ("lirefs"):
        compared()
    with mock.patch.object(passes, "__version__", f"0.{rank}"), both_differ("lirefs"):
        collected()


@scenario
def other_calls(rank: int, folder: Path) -> None:
    with both_differ("what is called"):
        compared() if rank else collected()


# What fails.


@scenario
def a_wrong_argument_in_one(rank: int, folder: Path) -> None:
    file = folder / f"journal of {rank}"
    if rank == 1:
        file.write_text("a file")
    with failing(rank, 1, SettingError, "is not a folder"):
        compared(journal=file)
    with failing(rank, 0, kfac.KfacError, "labels='none'"):
        collected(labels="sampled" if rank else "none")


@scenario
def an_exception_in_the_middle_of_a_part(rank: int, folder: Path) -> None:
    """And of a batch; the group can be used again afterwards."""
    for where in (0, 1):
        then = broken if rank == where else lambda: None
        with (
            at_call(lirefs.MultipleChoice, "run", 3, then),
            failing(rank, where, ValueError, "a broken item"),
        ):
            compared()
        with (
            at_call(TargetTracker, "add", 2, then),
            failing(rank, where, ValueError, "a broken item"),
        ):
            collected()
    assert compared() == (folder.parent / "alone.json").read_text()


@scenario
def ctrl_c_in_one(rank: int, folder: Path) -> None:
    """While it works, and while it waits for the other."""

    def interrupt() -> None:
        if rank == 1:
            os.kill(os.getpid(), signal.SIGINT)

    with (
        at_call(lirefs.ShortAnswer, "run", 2, interrupt),
        failing(rank, 1, KeyboardInterrupt, ""),
    ):
        compared(journal=folder / str(rank))

    def slow() -> None:
        if rank == 0:
            time.sleep(1.5)

    with (
        at_call(lirefs.ShortAnswer, "run", 1, slow),
        at_call(journal.Journal, "exchange", 1, threading.Timer(0.3, interrupt).start),
        failing(rank, 1, KeyboardInterrupt, ""),
    ):
        compared()
    assert compared(journal=folder / str(rank)) == (folder.parent / "alone.json").read_text()


# What is only slow or small.


@scenario
def one_that_starts_late(rank: int, folder: Path) -> None:
    said: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger(world.__name__)
    logger.addHandler(handler)
    with mock.patch.object(world, "LATE", 0.5):
        time.sleep(2 * rank)
        assert compared() == (folder.parent / "alone.json").read_text()
    logger.removeHandler(handler)
    assert said == ([] if rank else ["lirefs.compare: waiting for process 1 to call it too"])


@scenario
def one_that_never_comes(rank: int, folder: Path) -> None:
    with mock.patch.multiple(world, LATE=0.1, LATEST=1.0):
        time.sleep(2 * rank)
        with pytest.raises(DistributedError, match="process 1 did not call it within 1 s"):
            compared()


@scenario
def one_that_works_far_longer(rank: int, folder: Path) -> None:
    """Far longer than a process may be silent; Python and torch alike let it beat."""

    def work() -> None:
        end = time.monotonic() + 3 * rank
        while time.monotonic() < end:
            torch.linalg.eigh(torch.ones(60, 60))

    with (
        mock.patch.object(heartbeat, "EVERY", 0.2),
        at_call(lirefs.ShortAnswer, "run", 1, work),
    ):
        assert compared() == (folder.parent / "alone.json").read_text()


@scenario
def one_that_leaves_early(rank: int, folder: Path) -> None:
    """As all but the first do, which writes the report: it is done, and not gone."""
    with mock.patch.object(heartbeat, "EVERY", 0.1), world.together("a job") as ours:
        ours.wait()
        if rank == 0:
            time.sleep(2)
            ours.check()


@scenario
def an_empty_share(rank: int, folder: Path) -> None:
    few = [replace(one, items=one.items[:3]) for one in tasks()[:1]]
    with mock.patch.object(dist, "is_initialized", return_value=False):
        alone = compared(few, interventions={}), collected(BATCHES[:1])
    assert compared(few, interventions={}) == alone[0]
    assert_same(alone[1], collected(BATCHES[:1]))


# Journals and caches on one disk, on two, and in between.


def _resumed(rank: int, folders: list[Path]) -> None:
    """Stop a comparison in its last parts, then go on: nothing that is on a disk runs again."""
    fails = broken if rank == 1 else lambda: None
    with (
        at_call(lirefs.ShortAnswer, "run", 12 // len(folders), fails),
        failing(rank, 1, ValueError, "a broken item"),
    ):
        compared(journal=folders[rank])
    left = dist_gather(_finished(folders[rank]))
    with at_call(lirefs.ShortAnswer, "run", 0, broken) as answers:
        found = compared(journal=folders[rank])
    assert found == (folders[0].parents[1] / "alone.json").read_text()
    assert 0 < sum(dist_gather(len(answers))) < 15
    assert sum(left) > 20


def dist_gather(value: Any) -> list[Any]:
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, value)
    return found


def _finished(folder: Path) -> int:
    return sum(file.read_text().count('"key"') for file in folder.glob("*"))


@scenario
def journals_on_one_disk(rank: int, folder: Path) -> None:
    _resumed(rank, [folder / "both"] * 2)


@scenario
def journals_on_separate_disks(rank: int, folder: Path) -> None:
    _resumed(rank, [folder / "one", folder / "two"])


@scenario
def journals_of_which_one_was_lost(rank: int, folder: Path) -> None:
    """And one process that keeps none."""
    own = folder / str(rank)
    whole = (folder.parent / "alone.json").read_text()
    assert compared(journal=own) == whole
    if rank:
        shutil.rmtree(own)
    with at_call(lirefs.ShortAnswer, "run", 0, broken) as answers:
        assert compared(journal=None if rank else own) == whole
    assert 0 < sum(dist_gather(len(answers))) < 15


@scenario
def a_resume_with_another_number_of_processes(rank: int, folder: Path) -> None:
    whole = (folder.parent / "alone.json").read_text()
    with (
        mock.patch.object(dist, "is_initialized", return_value=False),
        at_call(lirefs.ShortAnswer, "run", 6, broken),
        pytest.raises(ValueError, match="a broken item"),
    ):
        compared(journal=folder / str(rank))
    assert compared(journal=folder / "0") == whole
    shared = folder / "shared"
    with (
        at_call(lirefs.ShortAnswer, "run", 6, broken if rank else lambda: None),
        failing(rank, 1, ValueError, "a broken item"),
    ):
        compared(journal=shared)
    if rank == 0:
        with mock.patch.object(dist, "is_initialized", return_value=False):
            assert compared(journal=shared) == whole


@scenario
def a_resume_after_one_was_killed(rank: int, folder: Path) -> None:
    """The journals, on two disks, are those of `killed`."""
    with at_call(lirefs.ShortAnswer, "run", 0, broken) as answers:
        found = compared(journal=folder.parent / f"killed-{rank}")
    assert found == (folder.parent / "alone.json").read_text()
    assert 0 < sum(dist_gather(len(answers))) < 15


@scenario
def caches_of_factors_half_and_half(rank: int, folder: Path) -> None:
    """Found by all, by one, by none; and with other bits in each."""
    texts, calls = ["Dan Reed lives in Paris.", "17 + 4 = 21", "abc", "de"], []
    collect = kfac.collect

    def counted(*args: Any, **kwargs: Any) -> kfac.Factors:
        calls.append(1)
        return collect(*args, **kwargs)

    def found(cache: Path) -> str:
        with mock.patch.object(kfac, "collect", counted):
            digest = factors_of(lm(), [1], None, cache, 0, texts, progress=False).digest
        assert len(set(dist_gather(digest))) == 1
        return digest

    own, shared = folder / str(rank), folder / "shared"
    first = found(own)
    assert found(own) == first
    assert len(calls) == 1
    if rank:
        shutil.rmtree(own)
    assert found(own) == first
    assert len(calls) == 2
    assert found(shared) == first
    assert len(calls) == 3
    assert found(shared) == first
    assert len(calls) == 3
    shutil.rmtree(own)
    with mock.patch.object(dist, "is_initialized", return_value=False):
        factors_of(lm(), [1], None, own, 0, [*texts[:-1], "x" * (rank + 1)], progress=False)
        (file,) = (own / "factors").glob("*.safetensors")
    given = folder / f"given {rank}"
    shutil.copy(file, given)
    with pytest.raises(DistributedError, match=r"processes \[0, 1\] have this file"):
        factors_of(lm(), [1], given, own, 0, texts, progress=False)


def _told_of_the_kill(folder: Path, call: Callable[[], object]) -> None:
    with pytest.raises(DistributedError, match="process 1 has given no sign of life"):
        call()
    seconds = time.time() - float((folder / "killed").read_text())
    assert seconds < LONGEST_WAIT
    (folder / "seconds-killed").write_text(f"{seconds:.1f}")
    os._exit(0)  # the group cannot be destroyed: one of it is gone


def _dies(rank: int, folder: Path) -> Callable[[], None]:
    def die() -> None:
        (folder / "killed").write_text(repr(time.time()))
        os.kill(os.getpid(), signal.SIGKILL)

    return die if rank == 1 else lambda: None


def killed(rank: int, folder: str) -> None:
    """One process is killed in the middle of a comparison. Sooner noticed than usual."""
    heartbeat.EVERY = 0.3
    killed_and_noticed_as_usual(rank, folder)


def killed_and_noticed_as_usual(rank: int, folder: str) -> None:
    journals = Path(folder) / f"killed-{rank}"
    with at_call(lirefs.ShortAnswer, "run", 4, _dies(rank, Path(folder))):
        _told_of_the_kill(Path(folder), lambda: compared(journal=journals))


def killed_while_collecting(rank: int, folder: str) -> None:
    """The checkpoints are on two disks as well."""
    path = f"{folder}/checkpoint of {rank}"
    with at_call(TargetTracker, "add", 2, _dies(rank, Path(folder))):
        _told_of_the_kill(Path(folder), lambda: collected(checkpoint=path, checkpoint_every=0))


def collecting_again(rank: int, folder: str) -> None:
    with at_call(TargetTracker, "add", 0, broken) as added:
        found = collected(checkpoint=f"{folder}/checkpoint of {rank}")
    assert len(added) == rank  # the first had added its three, the second one of two
    assert found.digest == collected().digest


def three(rank: int, folder: str) -> None:
    """Two of three processes share a disk."""
    (Path(folder) / "three").mkdir(exist_ok=True)
    disks = [Path(folder) / "three" / name for name in ("shared", "shared", "own")]
    _resumed(rank, disks)
    with pytest.raises(DistributedError, match=r"seed \(0 in process 0; 1 in processes 1, 2\)"):
        collected(seed=min(rank, 1))
    factors = collected()
    assert len(set(dist_gather(kfac.correct(llama(torch.float32), BATCHES, factors).digest))) == 1


def main_jobs(rank: int, folder: str) -> None:
    """Disks of their own, and factors in the cache of one of them; then the command itself."""
    own = Path(folder) / str(rank)
    os.environ["LIREFS_CACHE"] = str(own / "cache")
    settings = {"questions": f"{folder}/questions.jsonl", "edit_layers": [1], "limit": 2}
    with pytest.MonkeyPatch.context() as patch:
        small_jobs(patch)
        undrawn(patch)

        def job(out: str, **more: Any) -> lirefs.Comparison:
            console = Console(quiet=True)
            return run(f"{folder}/model", out=own / out, console=console, **settings, **more)

        if rank == 0:
            with mock.patch.object(dist, "is_initialized", return_value=False):
                job("alone")
        found = job("together")
        assert sorted(path.name for path in own.iterdir()) == sorted(
            ["cache", "together"] + ["alone"] * (rank == 0)
        )
        assert (own / "together" / "results.json").exists() is (rank == 0)
        assert not (own / "together" / "unfinished").exists()
        assert len(set(dist_gather(found.provenance["factors"]))) == 1
        assert len(set(dist_gather(repr(found.results)))) == 1
        with failing(rank, 1, ModelNotFoundError, "nowhere"):
            run("nowhere" if rank else f"{folder}/model", out=own / "failing", **settings)


def write_alone(folder: Path) -> None:
    """What one process gives, for scenarios to compare with."""
    (folder / "alone.json").write_text(compared())


def play(rank: int, folder: str) -> None:
    """Run every scenario, and note how long each took."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    seconds = {}
    for name, one in SCENARIOS.items():
        own = Path(folder) / name
        own.mkdir(exist_ok=True)
        begun = time.monotonic()
        one(rank, own)
        seconds[name] = time.monotonic() - begun
    (Path(folder) / f"seconds-{rank}.json").write_text(json.dumps(seconds))
