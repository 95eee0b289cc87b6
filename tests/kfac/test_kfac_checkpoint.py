import contextlib
import functools
import json
import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from checkpoint_runs import BATCHES, run, targets
from curvature_tools import assert_same, batch, llama
from torch import nn

import kfac
from kfac.factors.tensor_file import read_tensors, write_tensors
from lirefs.errors import BatchError, CheckpointError


class Interruption(BaseException):
    """Stands for a kill: nothing may catch it but a clean-up."""


@pytest.fixture(scope="module")
def model():
    return llama(torch.float32)


class Bomb:
    """Raises in the n-th call of anything that a collection goes through."""

    def __init__(self, model, monkeypatch, fuse):
        self.left = fuse
        for module in (model.model.layers[0], model.lm_head):
            forward = self.wrap(type(module).forward)
            monkeypatch.setattr(type(module), "forward", forward)
        for name in ("add_input", "add_gradient"):
            monkeypatch.setattr(
                kfac.collection.covariance.CovarianceSums,
                name,
                self.wrap(getattr(kfac.collection.covariance.CovarianceSums, name)),
            )
        monkeypatch.setattr(
            kfac.collection.checkpoint,
            "write_tensors",
            self.wrap(kfac.collection.checkpoint.write_tensors),
        )

    def wrap(self, function):
        @functools.wraps(function)
        def wrapped(*args, **kwargs):
            self.left -= 1
            if self.left == 0:
                raise Interruption
            return function(*args, **kwargs)

        return wrapped


@pytest.mark.parametrize("number", range(20))
def test_killed_anywhere_it_goes_on_to_the_bit(number, model, tmp_path, monkeypatch):
    expected = run(model, None)
    path = tmp_path / "state"
    pick = random.Random(number)
    every = pick.choice([0.0, 0.0, 1e9])
    with monkeypatch.context() as patch:
        Bomb(model, patch, pick.randrange(1, 60))
        with pytest.raises(Interruption):
            run(model, path, checkpoint_every=every)
        patch.undo()
        # A second time, unless less is left to do than the fuse is long.
        Bomb(model, patch, pick.randrange(1, 60))
        with contextlib.suppress(Interruption):
            run(model, path, checkpoint_every=every)
    assert run(model, path).digest == expected.digest
    # A finished collection only reads its data again.
    assert run(model, path).digest == expected.digest
    assert {p.name for p in tmp_path.iterdir()} - {"lirefs-cache"} == {"state"}


KILLED = """
import sys
from pathlib import Path
import torch
from checkpoint_runs import BATCHES, run
from curvature_tools import llama

def slowly():
    for number, one in enumerate(BATCHES):
        if number == 4:
            print("four batches", flush=True)
            sys.stdin.read()  # the kill comes here
        yield one

# Sums are the same to the bit only with as many threads.
torch.set_num_threads(int(sys.argv[2]))
run(llama(torch.float32), Path(sys.argv[1]), slowly())
"""


def test_a_process_killed_by_the_system_goes_on_to_the_bit(model, tmp_path):
    path = tmp_path / "state"
    child = subprocess.Popen(
        [sys.executable, "-c", KILLED, str(path), str(torch.get_num_threads())],
        cwd=Path(__file__).parents[1] / "support",
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    with child:
        assert child.stdout.readline() == "four batches\n"
        child.kill()
    assert child.returncode == -signal.SIGKILL
    assert read_tensors(path, "kfac_checkpoint", "checkpoint")[0]["done"] == 4
    assert run(model, path).digest == run(model, None).digest


def test_ctrl_c_waits_for_the_batch_and_leaves_a_checkpoint(model, tmp_path):
    path = tmp_path / "state"
    expected = run(model, None)
    handler = signal.getsignal(signal.SIGINT)
    seen = []

    def press(module, args, output):
        seen.append(1)
        if len(seen) == 3:
            os.kill(os.getpid(), signal.SIGINT)

    press.__module__ = "torch"  # a hook of unknown effect would be refused with a checkpoint
    hook = model.lm_head.register_forward_hook(press)
    with pytest.raises(KeyboardInterrupt):
        run(model, path, checkpoint_every=1e9)
    hook.remove()
    assert signal.getsignal(signal.SIGINT) is handler
    assert len(seen) == 3
    assert kfac.collection.checkpoint.Checkpoint(path, 0, {}).path.exists()
    seen.clear()
    hook = model.lm_head.register_forward_hook(press)
    seen += [1] * 9
    found = run(model, path)
    hook.remove()
    assert len(seen) == 9 + len(BATCHES) - 3
    assert found.digest == expected.digest


def test_ctrl_c_between_batches(model, tmp_path):
    def interrupted():
        yield from BATCHES[:4]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(model, tmp_path / "state", interrupted(), checkpoint_every=1e9)
    assert run(model, tmp_path / "state").digest == run(model, None).digest


def stop_after(count, batches=BATCHES):
    class Stopping:
        def __init__(self):
            self.given = 0

        def __iter__(self):
            for item in batches:
                if self.given == count:
                    raise Interruption
                self.given += 1
                yield item

    return Stopping()


def test_interrupted_in_a_later_pass(model, tmp_path):
    path = tmp_path / "state"
    need = kfac.plan(targets(model), marginals=True, dtype=torch.float32).bytes[0]
    with pytest.raises(Interruption):
        run(model, path, stop_after(9), budget=need - 1)
    assert run(model, path, budget=need - 1).digest == run(model, None).digest


def test_interrupted_correction(model, tmp_path):
    factors = run(model, None)
    expected = kfac.correct(model, BATCHES, factors, progress=False)
    options = {"checkpoint": tmp_path / "state", "checkpoint_every": 0.0, "progress": False}
    with pytest.raises(Interruption):
        kfac.correct(model, stop_after(3), factors, **options)
    assert kfac.correct(model, BATCHES, factors, **options).digest == expected.digest


def test_other_data_or_settings_are_refused(model, tmp_path):
    path = tmp_path / "state"
    with pytest.raises(Interruption):
        run(model, path, stop_after(3))
    with pytest.raises(CheckpointError, match="other data"):
        run(model, path, BATCHES[::-1])
    with pytest.raises(CheckpointError, match="only 2 are given"):
        run(model, path, BATCHES[:2])
    with pytest.raises(CheckpointError, match="seed"):
        run(model, path, seed=1)
    other = llama(torch.float32)
    nn.init.normal_(other.model.layers[1].mlp.up_proj.weight)
    with pytest.raises(CheckpointError, match="digests"):
        run(other, path)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match="delete it"):
        run(model, path)


def changed(path, tables=None, **fields):
    header, held = read_tensors(path, "kfac_checkpoint", "checkpoint")
    text = json.dumps(header | fields)
    write_tensors(path, {**held, **(tables or {})}, {"kfac_checkpoint": text})


def test_a_state_that_makes_no_sense_is_refused(model, tmp_path):
    path = tmp_path / "state"
    with pytest.raises(Interruption):
        run(model, path, stop_after(3))
    whole = path.read_bytes()
    header, tables = read_tensors(path, "kfac_checkpoint", "checkpoint")
    key = next(iter(tables))
    name = next(iter(header["counts"]))
    for says, fields in {
        "whole numbers": {"counts": {**header["counts"], name: -1}},
        "not an object": {"counts": []},
        "not texts": {"sources": {name: ["a"]}},
        "in pass 4 of 1": {"turn": 3},
        "other targets": {"counts": {**header["counts"], "nothing": 1}},
        "settings": {"settings": 1},
        "another dtype, shape": {"tables": {key: tables[key][:1]}},
        "dtype, shape or target": {"tables": {"A.nothing": tables[key]}},
        "not finite": {"tables": {key: tables[key] * torch.inf}},
    }.items():
        path.write_bytes(whole)
        changed(path, **fields)
        with pytest.raises(CheckpointError, match=says):
            run(model, path)
    lacking = {name: table for name, table in tables.items() if name != key}
    write_tensors(path, lacking, {"kfac_checkpoint": json.dumps(header)})
    with pytest.raises(CheckpointError, match="lacks sums"):
        run(model, path)


def test_passes_give_what_one_pass_gives(model):
    need = kfac.plan(targets(model), marginals=True, dtype=torch.float32).bytes[0] - 1
    one, many = run(model, None), run(model, None, budget=need)
    assert many.names == one.names
    assert_same(one, many, 1e-12)
    with pytest.raises(BatchError, match="only once"):
        run(model, None, iter(BATCHES), budget=need)


def test_a_resumed_collection_sees_labels_gaps_and_ends_of_batches(model, tmp_path):
    labelled = [one | {"labels": one["input_ids"].clone()} for one in BATCHES]
    fewer = [one | {"labels": one["labels"].clone()} for one in labelled]
    fewer[0]["labels"][0, 3] = -100
    # The tokens of BATCHES[1], with a masked one among them.
    ids, mask = batch([2], extra=1).values()
    order = [0, 1, 2, 7, 3, 4, 5, 6]
    gap = [BATCHES[0], {"input_ids": ids[:, order], "attention_mask": mask[:, order]}, *BATCHES[2:]]
    pairs = ((labelled, fewer), (labelled, BATCHES), (BATCHES, gap))
    for number, (given, changed) in enumerate(pairs):
        path = tmp_path / str(number)
        with pytest.raises(Interruption):
            run(model, path, stop_after(3, given))
        with pytest.raises(CheckpointError, match="other data"):
            run(model, path, changed)
    path = tmp_path / "ends"
    run(model, path, [batch([0]), batch([1, 2]), batch([5])])
    with pytest.raises(CheckpointError, match="other data"):
        run(model, path, [batch([0]), batch([1]), batch([2, 5])])


def test_a_resumed_collection_does_not_mind_padding(model, tmp_path):
    path = tmp_path / "state"
    with pytest.raises(Interruption):
        run(model, path, stop_after(3, [batch([0]), batch([1, 2]), batch([5]), batch([4])]))
    other = [batch([0], "left", 2), batch([1, 2], "left"), batch([5], "right", 1), batch([4])]
    assert run(model, path, other).tokens == run(model, None, other).tokens


def test_batches_that_change_between_passes_are_refused(model):
    class Changing:
        def __init__(self):
            self.turns = 0

        def __iter__(self):
            self.turns += 1
            self.turns += 1
            yield from BATCHES[: 5 - self.turns]

    need = kfac.plan(targets(model), marginals=True, dtype=torch.float32).bytes[0] - 1
    with pytest.raises(BatchError, match="pass 2 differ"):
        run(model, None, Changing(), budget=need)


def test_a_correction_lets_go_of_the_bases_after_each_pass(model, monkeypatch):
    made, held = [], []

    class Watched(kfac.collection.correct._CorrectionSums):
        def __init__(self, *args):
            super().__init__(*args)
            made.append(self)

        def add_gradient(self, *args):
            super().add_gradient(*args)
            held.append([len(sums._moved) for sums in made])

    factors = run(model, None)
    expected = kfac.correct(model, BATCHES, factors, progress=False)
    monkeypatch.setattr(kfac.collection.correct, "_CorrectionSums", Watched)
    need = kfac.plan(targets(model), correction=True, dtype=torch.float32).bytes[0] - 1
    found = kfac.correct(model, BATCHES, factors, progress=False, budget=need)
    assert found.digest == expected.digest
    assert len(made) == 2
    assert held[-1][0] == 0
    assert held[-1][1] > 0
