"""Work that is interrupted: by Ctrl-C in the library, and in a command."""

from __future__ import annotations

import hashlib
import os
import shutil
import signal
import sys
from pathlib import Path

import torch
from journal_runs import hooks, tasks, variants
from tiny import fresh_model, tiny_tokenizer

import kfac
import lirefs
from lirefs.comparison import journal

KINDS = ("capture", "collect", "compare")


def library(base: Path, rounds: int, connection) -> None:
    """Repeat each kind of work until an interrupt, some times; then check its files.

    Sends (kind, number) when a piece of work begins, and "clean" at the end.
    """
    journal.PART = 4
    # Wide enough for interrupts to arrive during the work: one that arrives in the middle of an
    # `__exit__`, torch's own included, leaves behind what it would have restored.
    model = fresh_model("llama", intermediate_size=256)
    model.model.embed_tokens.weight.requires_grad_(False)
    model.train()
    lm = lirefs.wrap(model, tiny_tokenizer(), name="tiny")
    batches = [lm.pad([[5 + (i * j) % 90 for j in range(30)]], side="right") for i in range(40)]
    found = kfac.find_targets(model, layers=[1, 2])
    edit = kfac.CurvatureEdit(kfac.collect(model, batches[:4], found, progress=False), keep=0.5)

    def state():
        weights = b"".join(p.detach().numpy().tobytes() for p in model.parameters())
        return (
            hashlib.sha256(weights).hexdigest(),
            hooks(lm),
            model.training,
            [p.requires_grad for p in model.parameters()],
            [p.grad for p in model.parameters()],
            torch.is_grad_enabled(),
            signal.getsignal(signal.SIGINT),
        )

    def capture(number):
        return lirefs.capture(lm, ["some text " * 5] * 64, cache=None, progress=False)

    def collect(number):
        settings = {"checkpoint": base / f"state-{number}", "checkpoint_every": 0.01}
        return kfac.collect(model, batches, found, progress=False, **settings)

    def compare(number):
        several = {**variants(), "edit": edit, "both": variants()["weak"] + edit}
        settings = {"journal": base / f"journal-{number}", "resamples": 20}
        return lirefs.compare(lm, several, tasks(), progress=False, **settings)

    before = state()
    for kind, act in zip(KINDS, (capture, collect, compare), strict=True):
        for number in range(rounds):
            try:
                connection.send((kind, number))
                while True:  # from the start each time, so that there is always work to interrupt
                    act(number)
                    (base / f"state-{number}").unlink(missing_ok=True)
                    shutil.rmtree(base / f"journal-{number}", ignore_errors=True)
            except KeyboardInterrupt:
                pass
            assert state() == before, (kind, number, state(), before)
    model.eval()
    whole = kfac.collect(model, batches, found, progress=False)
    expected = lirefs.compare(lm, {}, tasks(), resamples=20, progress=False).results["unchanged"]
    for number in range(rounds):
        assert collect(number).digest == whole.digest, number
        assert compare(number).results["unchanged"] == expected, number
    connection.send("clean")


def command(arguments: list[str], folder: Path, variables: dict[str, str], connection) -> None:
    """Run `lirefs ARGUMENTS` in a folder, with its standard error sent as plain bytes."""
    os.chdir(folder)
    os.environ.update(variables)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    os.dup2(connection.fileno(), 2)
    connection.close()
    sys.argv = ["lirefs", *arguments]
    from lirefs.cli.app import main

    main()
