"""Does Ctrl-C leave anything behind? A thousand interrupts at random moments in each of five loops.

    python benchmarks/interrupts.py               # three runs of 1,000 interrupts in each loop

The loops, on the organism: attach and remove alone; generation while steered; a forward pass under
a weight edit; the same under both; and `lm.generate`. An interrupt arrives after a random time of
up to two rounds of its loop. Once its exception has been handled, the script looks for hooks,
reservations, edited weights, changed modes, flags and settings, and handlers of signals. The exit
code is 1 if anything was left, or something other than the interrupt was raised. Times are drawn
from a seed, but the machine's speed decides which line they meet. Needs `signal.setitimer`, which
Windows lacks.
"""

from __future__ import annotations

import argparse
import random
import signal
import statistics
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

import kfac
import lirefs
from lirefs.errors import LirefsError
from lirefs.model import guest
from lirefs.model.interrupts import note
from lirefs.model.intervention import steerings_on
from lirefs.model.prompts import PROMPT
from lirefs.model.traits import PROBING

PROMPT_TEXT = "Math: 31 + 27 ="
IDS = torch.tensor([[5, 6, 7, 8, 9]])


class HandWritten:
    """An intervention of a user's own: a hook as PyTorch makes it."""

    def attach(self, model: nn.Module) -> Any:
        """Hook the last module."""
        return list(model.modules())[-1].register_forward_hook(lambda *given: None)

    def describe(self) -> dict[str, Any]:
        """Nothing to tell."""
        return {"kind": "hand-written"}


def loops(lm: lirefs.LanguageModel) -> dict[str, Callable[[], object]]:
    """What is interrupted: one round of each loop."""
    model = lm.model
    vector = torch.randn(lm.width, generator=torch.Generator().manual_seed(0))
    direction = lirefs.Direction(vector, 1)
    plain = lirefs.Steer(direction, "add", 0.1, layers="all")
    scoped = lirefs.Steer(direction, "amplify", 0.1, scope="generated")
    edit = kfac.MagnitudeEdit([one.name for one in kfac.find_targets(model, layers=[2, 3])], 0.5)
    both = scoped + edit
    parts = [plain, scoped, edit, both, lirefs.Prompted("Note: "), lirefs.compose(HandWritten())]

    def alone() -> None:
        for one in parts:
            with one.apply(model):
                pass
        handles: list[Any] = []
        try:
            # In `handle = both.attach(model)` an interrupt may come before the assignment.
            note(handles, both.attach, model)
        finally:
            for handle in handles:
                try:
                    handle.remove()
                finally:  # after an interrupt before its first line it must be called again
                    handle.remove()

    def under(intervention: Any, run: Callable[[], object]) -> Callable[[], None]:
        def rounds() -> None:
            with intervention.apply(model):
                run()

        return rounds

    def forward() -> None:
        with guest.evaluating(model):  # a pass alone leaves transformers' own `no_grad` half done
            model(IDS)

    def generate() -> str:
        return lm.generate(PROMPT_TEXT, max_new_tokens=2)

    return {
        "attach and remove": alone,
        "generate while steered": under(scoped, generate),
        "forward under an edit": under(edit, forward),
        "forward under both": under(both, forward),
        "lm.generate": generate,
    }


class Watch:
    """What a model and the process were before, and what differs now."""

    def __init__(self, lm: lirefs.LanguageModel) -> None:
        self.model = lm.model
        self.weights = [one.data for one in lm.model.parameters()]  # no other gets their addresses
        self.addresses = [one.data_ptr() for one in self.weights]
        self.copies = [one.clone() for one in self.weights]
        self.before = self.state()

    def state(self) -> dict[str, Any]:
        """Everything that an intervention or a call may change for a while, by name."""
        model, modules = self.model, list(self.model.modules())
        return {
            "hooks": [
                [name, *table]
                for module in modules
                for name, table in vars(module).items()
                if name.endswith(("_hooks", "_hooks_with_kwargs")) and isinstance(table, dict)
                if table
            ],
            "attributes": [
                {name: id(one) for name, one in vars(module).items() if callable(one)}
                for module in modules
            ],
            "modes": [module.training for module in modules],
            "gradients": [one.requires_grad for one in model.parameters()],
            "grad mode": (torch.is_grad_enabled(), torch.is_inference_mode_enabled()),
            "generation settings": id(model.generation_config),
            "texts and prompts": (PROMPT.get(), PROBING.get(), len(steerings_on(model))),
            "eager": len(guest._EAGER),
            "signal": signal.getsignal(signal.SIGINT),
        }

    def values_changed(self) -> bool:
        """Whether a value of a weight differs, which takes longer to see than another tensor."""
        now = self.model.parameters()
        return not all(torch.equal(one, old) for one, old in zip(now, self.copies, strict=True))

    def left(self) -> list[str]:
        """Names of what differs; a reservation and edited weights among them."""
        now = self.state()
        found = [name for name, value in self.before.items() if now[name] != value]
        parameters = list(self.model.parameters())
        if [one.data_ptr() for one in parameters] != self.addresses:
            found.append("weights")
        if refused(self.model):
            found.append("reservation")
        return found


def refused(model: nn.Module) -> bool:
    """Whether another thread may not change the model."""
    problems: list[LirefsError] = []

    def attach() -> None:
        try:
            lirefs.Prompted("Note: ").attach(model).remove()
        except LirefsError as problem:
            problems.append(problem)

    thread = threading.Thread(target=attach)
    thread.start()
    thread.join()
    return bool(problems)


def interrupted(work: Callable[[], object], seconds: float) -> str:
    """Repeat some work until an interrupt after so many seconds; what else was raised, or ''."""
    # Python runs handlers between two instructions of the main thread, whoever sent the signal.
    signal.signal(signal.SIGALRM, lambda number, frame: signal.raise_signal(signal.SIGINT))
    try:
        # Again after 10 seconds: Python drops what is raised in a `__del__` or by a weak reference.
        signal.setitimer(signal.ITIMER_REAL, seconds, 10.0)
        while True:
            work()
    except KeyboardInterrupt:
        return ""
    except BaseException as problem:
        return f"{type(problem).__name__}: {problem}"
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


def attack(name: str, count: int, seed: int) -> Counter[str]:
    """Interrupt a loop so many times; what was left, by kind, and how often."""
    lm = lirefs.load("organism")
    work, watch = loops(lm)[name], Watch(lm)
    times = []
    for _ in range(5):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    round_time = statistics.median(times)
    pick, found = random.Random(f"{seed} {name}"), Counter[str]()
    for _ in range(count):
        other = interrupted(work, max(1e-6, 2 * round_time * pick.random()))
        left = watch.left()
        if other:
            found[other] += 1
        if left:
            found[", ".join(left)] += 1
            lm = lirefs.load("organism")  # a new one: the old one is spoilt
            torch.set_grad_enabled(True)
            PROMPT.set(None)
            PROBING.set(False)
            work, watch = loops(lm)[name], Watch(lm)
    found["values of weights"] += watch.values_changed()
    return +found


def main() -> int:
    """Run, print a table, and return the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--count", type=int, default=1000, help="interrupts in each loop")
    parser.add_argument("--runs", type=int, default=3)
    given = parser.parse_args()
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # also in the background of a shell
    total = 0
    for seed in range(given.runs):
        for name in loops(lirefs.load("organism")):
            found = attack(name, given.count, seed)
            total += sum(found.values())
            kinds = "; ".join(f"{kind}: {count}" for kind, count in found.most_common())
            print(f"run {seed + 1}, {name}: {sum(found.values())} of {given.count}", flush=True)
            if kinds:
                print(f"    {kinds}", flush=True)
    print(f"left behind: {total}")
    return 1 if total else 0


if __name__ == "__main__":
    sys.exit(main())
