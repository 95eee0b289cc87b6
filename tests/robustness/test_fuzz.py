"""Damaged files of every kind are refused with a named error, or read as something sensible.

`pytest tests/robustness/test_fuzz.py --fuzz-cases 10000 -k results -s` runs more of one kind.
"""

import os
import pickle
import signal
import sys
import time
from pathlib import Path
from random import Random

import fuzzing
import pytest
from fuzz_formats import FORMATS
from fuzzing import Format, Found, damaged, run

from lirefs.errors import DataFileError

pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="limits and memory are those of Linux"),
    pytest.mark.timeout(0),  # each case runs in a process with its own time limit
]


@pytest.fixture(scope="module")
def samples(tmp_path_factory):
    """A function from the name of a format to valid contents, which are made once."""
    made = {}

    def of(name):
        if name not in made:
            made[name] = FORMATS[name].make(tmp_path_factory.mktemp("valid"))
        return made[name]

    return of


@pytest.mark.parametrize("name", FORMATS)
def test_damaged_files(name, samples, pytestconfig, tmp_path):
    one = FORMATS[name]
    cases = pytestconfig.getoption("--fuzz-cases")
    if cases == 150:
        cases //= one.slowness
    started = time.monotonic()
    found = run(name, one, samples(name), range(cases))
    sys.stdout.write(
        f"\n{name}: {cases} cases, {time.monotonic() - started:.0f} s, {found.accepted} accepted, "
        f"{found.refused} refused, {len(found.faults)} faults, {found.peak / 2**20:.1f} MiB, "
        f"slowest {found.slowest[0]:.2f} s (seed {found.slowest[1]})\n"
    )
    lines = []
    for seed, fault in found.faults.items():
        content = damaged(name, seed, one.structure, samples(name))
        path = tmp_path / f"seed-{seed}"
        path.write_bytes(content)
        lines.append(f"seed {seed}: {fault}; {len(content)} bytes in {path}: {content[:80]!r}")
    assert not lines, "\n".join(lines)
    assert found.accepted + found.refused == cases


@pytest.mark.parametrize("name", FORMATS)
def test_valid_files_are_read_and_most_cases_are_damaged(name, samples, tmp_path):
    for number, content in enumerate(samples(name)):
        place = tmp_path / str(number)
        place.mkdir()
        FORMATS[name].read(place, content)
    contents = [damaged(name, seed, FORMATS[name].structure, samples(name)) for seed in range(40)]
    assert sum(one not in samples(name) for one in contents) >= 32
    change = fuzzing.MUTATORS[FORMATS[name].structure]  # and its own mutator makes many changes
    assert len({change(Random(seed), samples(name)[0], samples(name)) for seed in range(40)}) > 10
    assert contents[3] == damaged(name, 3, FORMATS[name].structure, samples(name))


class Evil:
    def __reduce__(self):
        return print, ("unpickled",)


def _fault(read):
    """The first fault of three cases, or all that was found if there is none."""
    probe = Format("bytes", lambda _: [b""], read)
    found = run("probe", probe, [b"valid"], range(3), most_faults=1)
    return found if not found.faults else found.faults[0]


def _nothing(folder, content):
    (folder / "a").write_bytes(content)
    (folder / "a").rename(folder / "b")
    (folder / "b").unlink()


def _refuses(folder, content):
    if content != b"valid":
        raise DataFileError("no")


def _unless_valid(act):
    return lambda folder, content: content == b"valid" or act(folder)


def test_what_is_allowed_is_not_a_fault():
    assert _fault(_nothing).accepted == 3
    found = _fault(_refuses)
    assert isinstance(found, Found)
    assert (found.refused, found.accepted + found.refused) == (3, 3)


@pytest.mark.parametrize(
    ("act", "says"),
    [
        (lambda folder: {}["x"], "KeyError"),
        (lambda folder: Path("/etc/hostname").read_text(), "touched /etc/hostname"),
        (
            lambda folder: (folder / "../../fuzz-outside").write_text(""),
            "fuzz-outside",
        ),
        (lambda folder: (folder.parent.parent / "x").mkdir(), "touched"),
        (lambda folder: pickle.loads(pickle.dumps(Evil())), "pickle.find_class"),
        (lambda folder: bytearray(200 << 20), "MiB for a file"),
        (lambda folder: bytearray(2 << 30), "MemoryError"),
        (lambda folder: sys.exit(0), "SystemExit"),
        (lambda folder: os.kill(os.getpid(), signal.SIGSEGV), "SIGSEGV"),
    ],
)
def test_faults_are_found(act, says):
    assert says in _fault(_unless_valid(act))


def test_a_reader_that_does_not_end_is_a_fault(monkeypatch):
    monkeypatch.setattr(fuzzing, "SECONDS", 0.1)

    def busy(folder):
        while True:
            pass

    assert "not enough" in _fault(_unless_valid(busy))
    assert "not enough" in _fault(_unless_valid(lambda folder: time.sleep(60)))
