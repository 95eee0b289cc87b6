"""Damage valid files, and read each of them in a forked process.

A case depends only on the name of its format and a seed. Its process has limits on address space
and time, and must not open files outside the case's folder. A case ends in one of three ways:
accepted, refused with an error of the packages, or a fault.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import os
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

from mutators import MUTATORS, flipped

from lirefs.errors import KfacError, LirefsError

SECONDS = 10.0
"""Limit on the processor time of a case; a case that sleeps ends after ten times as long."""
ADDRESSES = 768 << 20
"""Address space that cases may take in addition to that before the first case."""
RESIDENT = 96 << 20
"""Memory that a case may take in addition to that of its process."""
_HOME = Path(__file__).parents[2].resolve()
_SYSTEM = ("/proc", "/sys", "/usr", os.devnull, "/dev/urandom")  # the libraries read these
_WRITES = ("os.mkdir", "os.remove", "os.rename", "os.rmdir", "os.symlink", "os.link", "shutil.move")
_NEVER = ("pickle.find_class", "subprocess.Popen", "os.system", "os.exec", "socket.connect")


class Insane(Exception):
    """The result of reading a file breaks the promises of its format."""


class Outside(BaseException):
    """A case touched a file outside its folder, unpickled something or started a program."""


@dataclass(frozen=True)
class Format:
    """One kind of file.

    Attributes:
        structure: Key of `MUTATORS` for its structure.
        make: Makes valid contents in an empty folder and returns them.
        read: Writes a content to a file in a folder and reads it as users do; raises `Insane` if
            the result makes no sense.
        resident: Bytes that one case may take.
        slowness: Time of a case relative to other formats; fewer cases are run.
    """

    structure: str
    make: Callable[[Path], list[bytes]]
    read: Callable[[Path, bytes], None]
    resident: int = RESIDENT
    slowness: int = 1


@dataclass
class Found:
    """Results of the cases of a format.

    Attributes:
        accepted: Number of cases that were read.
        refused: Number of cases that were refused with a named error.
        peak: Largest number of bytes that a case took.
        slowest: Largest processor time of a case in seconds, and its seed.
        faults: What went wrong, by seed.
    """

    accepted: int = 0
    refused: int = 0
    peak: int = 0
    slowest: tuple[float, int] = (0.0, 0)
    faults: dict[int, str] = field(default_factory=dict)


def damaged(name: str, seed: int, structure: str, samples: list[bytes]) -> bytes:
    """The content of a case: a valid one with one to three changes."""
    rng = Random(f"{name} {seed}")
    content = rng.choice(samples)
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        change = flipped if rng.random() < 0.35 else MUTATORS[structure]
        with contextlib.suppress(Exception):
            # An earlier change may have destroyed the structure.
            content = change(rng, content, samples)
    return content


def run(
    name: str, one: Format, samples: list[bytes], seeds: Iterable[int], most_faults: int = 20
) -> Found:
    """Run the cases of some seeds; after a fault, a new process continues with the next seed."""
    found = Found()
    left = list(seeds)
    while left and len(found.faults) < most_faults:
        left = left[_in_a_process(name, one, samples, left, found) :]
    return found


def _in_a_process(
    name: str, one: Format, samples: list[bytes], seeds: list[int], found: Found
) -> int:
    """Run cases in one process until the first fault; return how many were run."""
    folder = tempfile.mkdtemp(prefix="fuzz-")
    into, out = os.pipe()
    child = os.fork()
    if not child:
        try:
            os.close(into)
            _cases(name, one, samples, seeds, Path(folder), out)
        except BaseException:
            _write(out, {"broken": traceback.format_exc()})
        finally:
            os._exit(0)
    os.close(out)
    ran, fault = 0, None
    with os.fdopen(into) as pipe:
        for line in pipe:
            case = json.loads(line)
            if "broken" in case:
                raise RuntimeError(f"{name}: {case['broken']}")
            if "began" in case:
                ran += 1
                fault = "the process ended"
                continue
            fault = case["fault"]
            found.peak = max(found.peak, case["peak"])
            found.slowest = max(found.slowest, (case["seconds"], seeds[ran - 1]))
            found.accepted += case["accepted"]
            found.refused += not case["accepted"] and fault is None
    _, status = os.waitpid(child, 0)
    shutil.rmtree(folder, ignore_errors=True)
    if os.WIFSIGNALED(status):
        number = os.WTERMSIG(status)
        slow = number in (signal.SIGPROF, signal.SIGALRM)
        fault = f"{SECONDS:g} s were not enough" if slow else f"died of {signal.Signals(number)!r}"
    if not ran:
        raise RuntimeError(f"{name}: no case began ({fault})")
    if fault is not None:
        found.faults[seeds[ran - 1]] = fault
    return ran


def _cases(
    name: str, one: Format, samples: list[bytes], seeds: list[int], folder: Path, out: int
) -> None:
    """Run cases in the forked process and write the results to `out`."""
    warnings.simplefilter("ignore")
    quiet = os.open(os.devnull, os.O_WRONLY)
    os.dup2(quiet, 1)
    os.dup2(quiet, 2)
    sys.dont_write_bytecode = True
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    faulthandler.disable()  # the parent reports what killed a case
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    tempfile.tempdir = str(folder)
    os.chdir(folder)
    for sample in samples:  # the first use imports and caches things
        with _case_folder(folder) as place:
            one.read(place, sample)
    limit = _memory("VmSize") + ADDRESSES
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    watch = _Watch(folder)
    sys.addaudithook(watch)
    for seed in seeds:
        content = damaged(name, seed, one.structure, samples)
        with _case_folder(folder) as place:
            _write(out, {"began": seed})
            case = _case(one, place, content, watch)
        _write(out, case)
        if case["fault"] is not None:
            return


def _case(one: Format, place: Path, content: bytes, watch: _Watch) -> dict[str, Any]:
    fault = None
    accepted = False
    Path("/proc/self/clear_refs").write_text("5")  # reset the peak
    before, started = _memory("VmRSS"), time.process_time()
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    signal.setitimer(signal.ITIMER_REAL, 10 * SECONDS)
    watch.on = True
    try:
        one.read(place, content)
        accepted = True
    except (LirefsError, KfacError) as error:
        if not str(error).strip():
            fault = f"{type(error).__name__} without a message"
    except BaseException as error:
        where = traceback.extract_tb(error.__traceback__)[-4:]
        lines = [f"{Path(at.filename).name}:{at.lineno} {at.name}" for at in where]
        fault = f"{type(error).__name__}: {str(error)[:300]} ({', '.join(lines)})"
    watch.on = False
    signal.setitimer(signal.ITIMER_PROF, 0)
    signal.setitimer(signal.ITIMER_REAL, 0)
    peak = max(0, _memory("VmHWM") - before)
    if watch.seen:
        fault = watch.seen
    elif fault is None and peak > one.resident:
        fault = f"took {peak >> 20} MiB for a file of {len(content)} bytes"
    seconds = time.process_time() - started
    accepted = accepted and fault is None
    return {"accepted": accepted, "fault": fault, "peak": peak, "seconds": seconds}


class _Watch:
    """An audit hook; safetensors and tokenizers, written in Rust, raise no audit events."""

    def __init__(self, folder: Path) -> None:
        self.on = False
        self.seen: str | None = None
        places = (str(folder), os.environ["LIREFS_CACHE"])  # traits of each model are kept there
        self._own = (*places, *map(os.path.realpath, places))
        prefixes = {sys.prefix, sys.base_prefix, str(_HOME), *_SYSTEM, *sys.path} - {""}
        self._read = tuple({os.path.realpath(one) for one in prefixes} | prefixes)

    def __call__(self, event: str, arguments: tuple[Any, ...]) -> None:
        if not self.on:
            return
        if event in _NEVER:
            self._stop(f"{event} {arguments!r:.200}")
        if event == "open" and isinstance(arguments[0], str | bytes):
            mode, flags = arguments[1], arguments[2]
            writes = (mode and set(mode) & set("wax+")) or flags & (os.O_WRONLY | os.O_RDWR)
            self._path(arguments[0], () if writes else self._read)
        if event in _WRITES and isinstance(arguments[0], str | bytes):
            self._path(arguments[0], ())

    def _path(self, path: str | bytes, others: tuple[str, ...]) -> None:
        full = os.path.abspath(os.fsdecode(path))  # noqa: PTH100 (a link is not followed)
        if not any(full == one or full.startswith(f"{one}/") for one in (*self._own, *others)):
            self._stop(f"touched {full[:300]}")

    def _stop(self, what: str) -> None:
        self.seen = self.seen or what
        raise Outside(what)


@contextlib.contextmanager
def _case_folder(folder: Path) -> Iterator[Path]:
    place = folder / "case"
    place.mkdir()
    try:
        yield place
    finally:
        shutil.rmtree(place, ignore_errors=True)


def _memory(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) << 10
    raise LookupError(field)


def _write(out: int, row: dict[str, Any]) -> None:
    os.write(out, f"{json.dumps(row)}\n".encode())
