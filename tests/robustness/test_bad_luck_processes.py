"""Processes that share a cache, are killed while they write, or are interrupted."""

import multiprocessing
import os
import random
import signal
import time
import zipfile
from contextlib import ExitStack

import forked
import interrupted
import pytest
import shared_cache
from writers import WRITERS, contents

import kfac
import lirefs
from lirefs import Directions, load_comparison, mine
from lirefs.comparison.journal import Journal
from lirefs.export import from_gguf
from lirefs.model import builtin
from lirefs.model.processes.world import World
from lirefs.tasks import ItemResult


def test_processes_that_share_a_cache_find_what_one_finds(tmp_path):
    rounds, names = 2, "bc"
    for folder in ("alone", "together"):
        (tmp_path / folder).mkdir()
        with zipfile.ZipFile(tmp_path / folder / builtin.SMOLLM2_WHEEL, "w") as archive:
            archive.writestr("tiny.gguf", b"GGUF")
    each = [("alone", "a", forked.CONTEXT.Barrier(1))]
    together = forked.CONTEXT.Barrier(len(names))
    each += [("together", name, together) for name in names]
    with ExitStack() as stack:
        running = [
            stack.enter_context(
                forked.started(shared_cache.use, tmp_path / folder, name, rounds, barrier)
            )
            for folder, name, barrier in each
        ]
        said = [connection.recv() for _, connection in running]
        for process, _ in running:
            process.join(60)
        assert [process.exitcode for process, _ in running] == [0] * 3, said
    alone, *others = [found for found, _ in said]
    assert others == [alone] * 2
    assert all(same for _, _, same in alone)
    assert [warned for _, warned in said] == [[]] * 3  # nothing was damaged or made again
    for number in range(rounds):
        cache = tmp_path / "together" / f"cache-{number}"
        assert not list(cache.rglob(".*"))
        for kind in ("activations", "factors", "models"):
            assert len(list((cache / kind).iterdir())) == 1
        lines = Journal(cache / "journal", World())._lines
        keys = {shared_cache.key_of(name, part): name for name in names for part in range(5)}
        assert sorted(lines) == sorted(keys)
        assert all(one.prompt[-1] == keys[key][-1] for key, found in lines.items() for one in found)


KEYS = ["0a" * 32, "0b" * 32]
"""Of the parts of a journal, which are SHA-256s."""


def journal_line(lm, made, folder, seed):
    items = [ItemResult(f"{i}", {}, prompt=f"{seed}" * 40_000) for i in range(8)]
    Journal(folder, World()).add(KEYS[seed], items)


def whole_lines(folder):
    lines = Journal(folder, World())._lines
    assert set(lines) <= set(KEYS)
    for key, items in lines.items():
        assert [item.prompt for item in items] == [f"{KEYS.index(key)}" * 40_000] * 8
    return lines


TEXTS = [(f"t{i}", f"{i} some text that is long enough {i}") for i in range(9)]


def search(lm, folder):
    settings = {"prefix_tokens": 4, "suffix_tokens": 4, "batch_tokens": 16, "progress": False}
    return mine(lm, TEXTS, journal=folder / "search", **settings)


def search_again(lm, made, folder, seed):
    (folder / "search").unlink(missing_ok=True)
    search(lm, folder)


READERS = {
    "directions": lambda folder: Directions.load(folder / "d.safetensors"),
    "factors": lambda folder: kfac.Factors.load(folder / "f.safetensors"),
    "report": load_comparison,
    "control vector": lambda folder: from_gguf(folder / "c.gguf"),
    "organism": lambda folder: lirefs.load(folder),
    "text": lambda folder: (folder / "t").read_text(),
    "journal": whole_lines,
    "search": lambda folder: None,
}
APPENDED = {"journal": journal_line, "search": search_again}


@pytest.mark.parametrize("name", READERS)
def test_a_killed_writer_leaves_whole_files(name, lm, made, tmp_path):
    """Killed thirty times at random moments, from before the first write to after some."""
    write = {**WRITERS, **APPENDED}[name]
    expected = [{}, {}]
    for seed in (0, 1):
        began = time.monotonic()
        write(lm, made, tmp_path / f"{seed}", seed)
        seconds = time.monotonic() - began
        expected[seed] = contents(tmp_path / f"{seed}")
    counts = search(lm, tmp_path / "0").counts if name == "search" else None
    pick, place, ends = random.Random(name), tmp_path / "place", 0
    context = multiprocessing.get_context("fork")  # cheap, and the writers have no backward pass

    def again_and_again(ready, early):
        if early:
            ready.set()
        while True:
            for seed in (0, 1):
                write(lm, made, place, seed)
                ready.set()

    for number in range(30):
        ready = context.Event()
        early = number % 2 == 0  # half of them before the first write, half after it
        process = context.Process(target=again_and_again, args=(ready, early), daemon=True)
        process.start()
        ready.wait(60)
        time.sleep(pick.random() * 2 * seconds)
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        assert process.exitcode == -signal.SIGKILL
        # Files that a killed process could not remove are hidden, and nothing reads them.
        found = {file: data for file, data in contents(place).items() if not file.startswith(".")}
        if name == "search":
            assert search(lm, place).counts == counts
        elif name not in APPENDED:
            for file, data in found.items():
                assert data in (expected[0][file], expected[1][file]), file
        if found.keys() == expected[0].keys():
            READERS[name](place)
            ends += 1
    assert ends > 5


def test_an_interrupted_library_leaves_the_model_as_it_was_and_its_files_usable(tmp_path):
    rounds, pick = 2, random.Random(0)
    with forked.started(interrupted.library, tmp_path, rounds) as (process, connection):
        for kind in interrupted.KINDS:
            for number in range(rounds):
                assert connection.recv() == (kind, number)
                time.sleep(pick.random() / 2)
                os.kill(process.pid, signal.SIGINT)
        assert connection.recv() == "clean"
        process.join(60)
        assert process.exitcode == 0


@pytest.mark.parametrize(
    ("arguments", "reached"),
    [
        pytest.param(
            ["compare", "--edit-layers", "1,2", "--quick", "--out", "report"],
            " comparison ",
            marks=pytest.mark.slow,
        ),
        (["curvature", "collect", "--layers", "1", "--out", "f.safetensors"], "token"),
    ],
    ids=["compare", "collect"],
)
def test_an_interrupted_command_says_so_in_one_line(arguments, reached, model_folder, tmp_path):
    arguments = [*arguments, "--model", str(model_folder)]
    variables = {"LIREFS_CACHE": str(tmp_path / "cache"), "COLUMNS": "200"}
    command = (interrupted.command, arguments, tmp_path, variables)
    with forked.started(*command) as (process, connection):
        printed = b""
        while reached.encode() not in printed:
            piece = os.read(connection.fileno(), 4096)
            assert piece, printed.decode()
            printed += piece
        os.kill(process.pid, signal.SIGINT)
        while piece := os.read(connection.fileno(), 4096):
            printed += piece
        process.join(120)
        rest = printed.decode()
        assert process.exitcode == 130, rest
    assert "Traceback" not in rest
    assert arguments[0] != "compare" or "--resume" in rest
    assert not list(tmp_path.rglob(".*"))
    assert not (tmp_path / "f.safetensors").exists()
