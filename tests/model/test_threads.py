"""Threads: on models of their own they never meet; on one model one thread changes at a time."""

from __future__ import annotations

import asyncio
import re
import sys
import threading

import pytest
import torch
from tiny import fresh_model, tiny_tokenizer

from kfac.edits.weight_edit import WeightEdit
from kfac.targets import find_targets
from lirefs import Direction, Gate, Schedule, Steer, capture, compose, wrap
from lirefs.errors import EditError, InterventionError
from lirefs.model.intervention import applied
from lirefs.model.layout_search import find_layout
from lirefs.model.weight_swap import SwappedWeight

ROUNDS = 100
IDS = torch.tensor([[0, 40, 50, 60, 70, 80], [2, 2, 0, 33, 44, 55]])
MASK = (IDS != 2).long()
WAIT = 30.0


class Halved(WeightEdit):
    """Half of every matrix that an MLP reads with."""

    kind = "halved"

    def prepare(self, model):
        return [(one, one.weight / 2) for one in find_targets(model)]

    def describe(self):
        return {"kind": self.kind}


def direction(layer=1, seed=0, **more):
    vector = torch.randn(32, generator=torch.Generator().manual_seed(seed))
    return Direction(vector, layer, **more)


def logits(model):
    with torch.no_grad():
        return model(IDS, attention_mask=MASK).logits


def together(*works):
    """Run each work in a thread of its own; raise what one of them raised."""
    problems = []

    def guarded(work):
        try:
            work()
        except BaseException as problem:
            problems.append(problem)

    threads = [threading.Thread(target=guarded, args=(work,), daemon=True) for work in works]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(WAIT)
    assert not any(thread.is_alive() for thread in threads), "a thread hangs"
    if problems:
        raise problems[0]


@pytest.fixture
def switching(monkeypatch):
    """Threads take turns a hundred times more often than usual."""
    usual = sys.getswitchinterval()
    sys.setswitchinterval(5e-5)
    yield
    sys.setswitchinterval(usual)


def shared_interventions():
    """Each is one object, for both threads: what it remembers belongs to both."""
    one, gate = direction(), Gate(direction(layer=0, seed=3), 0.0, per="row")
    return [
        Steer(one, "ablate", layers="all"),
        Steer(one, "add", 3.0, scope="last_prompt_token"),
        Steer(one, "add", [2.0, None]),
        compose(Steer(one, "clamp", 1.0, gate=gate), Halved()),
        compose(Halved(), Steer(direction(seed=1), "amplify", 2.0, scope="prompt")),
    ]


def test_two_models_never_meet(switching):
    models = [fresh_model("llama"), fresh_model("llama", num_hidden_layers=3)]
    interventions = shared_interventions()
    expected = []
    for model in models:
        expected.append([logits(model)])
        for one in interventions:
            with applied(one, model):
                expected[-1].append(logits(model))
    assert len({row.sum().item() for rows in expected for row in rows}) == 12
    barrier = threading.Barrier(2, timeout=WAIT)

    def work(model, wanted, first):
        for turn in range(ROUNDS):
            number = (turn + first) % len(interventions)
            barrier.wait()
            with applied(interventions[number], model):
                assert torch.equal(logits(model), wanted[1 + number])
            assert torch.equal(logits(model), wanted[0])

    together(lambda: work(models[0], expected[0], 0), lambda: work(models[1], expected[1], 2))
    for model in models:
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_a_schedule_is_shared_by_two_models(switching):
    lms = [wrap(fresh_model("llama"), tiny_tokenizer()) for _ in range(2)]
    schedule = Schedule(lambda index: 1.0 if index % 2 else -2.0)
    steer = Steer(direction(site="resid_post"), "add", schedule)
    prompts = ["short", "a longer prompt"]
    settings = {"max_new_tokens": 6, "min_new_tokens": 6}
    with Steer(direction(site="resid_post"), "add", Schedule([-2.0, 1.0] * 3)).apply(lms[0].model):
        expected = lms[0].generate(prompts, **settings)
    barrier = threading.Barrier(2, timeout=WAIT)

    def work(lm):
        for _ in range(5):
            barrier.wait()
            with steer.apply(lm.model):
                assert lm.generate(prompts, **settings) == expected

    together(*(lambda lm=lm: work(lm) for lm in lms))


@pytest.mark.parametrize(
    ("first", "second", "rounds"),
    [
        ("steer", "steer", ROUNDS),
        ("edit", "edit", ROUNDS),
        ("edit", "steer", 50),
        ("both", "edit", 50),
    ],
)
def test_a_second_thread_is_refused(first, second, rounds, switching):
    kinds = {
        "steer": (lambda: Steer(direction(), "add", 3.0), InterventionError),
        "edit": (Halved, EditError),
        "both": (lambda: compose(Halved(), Steer(direction(), "ablate")), InterventionError),
    }
    model = fresh_model("llama")
    clean = logits(model)
    chosen = [kinds[first][0](), kinds[second][0]()]
    errors = (kinds[first][1], kinds[second][1])
    wanted = []
    for one in chosen:
        with applied(one, model):
            wanted.append(logits(model))
    barrier = threading.Barrier(2, timeout=WAIT)
    won = [0, 0]

    def work(mine):
        for _ in range(rounds):
            barrier.wait()
            handle = None
            try:
                handle = chosen[mine].attach(model)
            except errors[mine] as error:
                assert "Thread-" in str(error)  # noqa: PT017 (a thread may win or lose)
                assert "not yet restored" in str(error)  # noqa: PT017
            barrier.wait()
            if handle is not None:
                won[mine] += 1
                assert torch.equal(logits(model), wanted[mine])
                handle.remove()
            barrier.wait()
            assert torch.equal(logits(model), clean)

    together(lambda: work(0), lambda: work(1))
    assert sum(won) == rounds  # in every round exactly one


def test_the_holder_may_nest_and_others_are_let_in_when_it_is_done(lm):
    outcome = []

    def other():
        for kind in (Steer(direction(), "add"), Halved()):
            try:
                kind.attach(lm.model).remove()
                outcome.append("in")
            except (InterventionError, EditError):
                outcome.append("out")

    clean = logits(lm.model)
    handles = [
        Steer(direction(), "add").attach(lm.model),
        Halved().attach(lm.model),
        Steer(direction(layer=2), "ablate").attach(lm.model),
    ]
    together(other)
    for handle in reversed(handles):
        handle.remove()
        handle.remove()  # a second time lets nobody in early
        together(other)
    assert outcome == ["out"] * 6 + ["in"] * 2
    assert torch.equal(logits(lm.model), clean)


def test_a_handle_may_be_removed_by_another_thread_and_outlive_its_own():
    model = fresh_model("llama")
    handles = []
    together(lambda: handles.append(Steer(direction(), "add").attach(model)))
    inner = Steer(direction(layer=2), "add").attach(model)  # the first thread has ended
    together(handles[0].remove)
    inner.remove()
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize("wrong", [direction(layer=99), direction(site="resid_mid")])
def test_what_fails_to_attach_holds_nothing(lm, wrong):
    for one in (Steer(wrong, "add"), compose(Halved(), Steer(wrong, "add"))):
        with pytest.raises(Exception, match=r"layer 99|site must be"):
            one.attach(lm.model)
    broken = Halved()
    broken.prepare = lambda model: [(one, one.weight * torch.nan) for one in find_targets(model)]
    with pytest.raises(EditError, match="not finite"):
        broken.attach(lm.model)
    together(lambda: Steer(direction(), "add").attach(lm.model).remove())


def test_capture_and_the_search_for_a_layout_hear_their_own_thread_alone(switching):
    model = fresh_model("llama")
    lm = wrap(model, tiny_tokenizer())
    prompts = {True: ["one", "a longer prompt"], False: ["0123456789", "Q: why?"]}
    expected = {side: capture(lm, texts, progress=False).values for side, texts in prompts.items()}
    barrier = threading.Barrier(2, timeout=WAIT)

    def work(side):
        for _ in range(ROUNDS // 4):
            barrier.wait()
            found = capture(lm, prompts[side], progress=False).values
            assert torch.equal(found, expected[side])
            assert find_layout(model) == lm.layout

    together(lambda: work(True), lambda: work(False))
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize("kind", ["steer", "edit", "both"])
def test_of_two_threads_that_remove_one_handle_one_does(kind, monkeypatch, switching):
    model = fresh_model("llama")
    clean = logits(model)
    steer = Steer(direction(), "add", scope="prompt")
    one = {"steer": steer, "edit": Halved(), "both": compose(steer, Halved())}[kind]
    restore = SwappedWeight.restore
    times = []
    monkeypatch.setattr(
        SwappedWeight, "restore", lambda self: (times.append(self.name), restore(self))
    )
    refused = []
    for _ in range(30):
        handle = one.attach(model)
        barrier = threading.Barrier(2, timeout=WAIT)

        def remove(handle=handle, barrier=barrier):
            barrier.wait()
            try:
                handle.remove()
            except InterventionError as problem:
                refused.append(str(problem))

        times.clear()
        together(remove, remove)
        assert len(times) == len(set(times)) == (0 if kind == "steer" else 8)
        assert torch.equal(logits(model), clean)
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert all("another thread is removing this" in problem for problem in refused)
    together(lambda: one.attach(model).remove())  # no reservation is left


def test_a_second_task_of_one_thread_is_refused():
    model = fresh_model("llama")
    steers = [Steer(direction(seed=seed), "add", 3.0) for seed in range(2)]
    found = []

    async def work(number):
        try:
            with steers[number].apply(model):
                await asyncio.sleep(0)
                found.append((number, logits(model)))
                await asyncio.sleep(0)
        except InterventionError as problem:
            found.append((number, str(problem)))

    async def main():
        await asyncio.gather(work(0), work(1))
        await work(1)

    asyncio.run(main())
    assert [number for number, _ in found] == [1, 0, 1]
    assert re.match("task 'Task-.*has changed this model and not yet restored it", found[0][1])
    for number, seen in found[1:]:
        with steers[number].apply(model):
            assert torch.equal(seen, logits(model))


def test_a_task_may_attach_more_under_the_one_that_started_it():
    model = fresh_model("llama")
    clean = logits(model)
    outer, inner = Steer(direction(), "add", 3.0), Halved()

    async def work():
        with inner.apply(model):
            await asyncio.sleep(0)
            return logits(model)

    async def main():
        with outer.apply(model):
            return await asyncio.create_task(work())

    for around in (None, Steer(direction(layer=2), "ablate")):  # attached before the loop began
        with applied(around, model):
            found = asyncio.run(main())
            with outer.apply(model), inner.apply(model):
                assert torch.equal(found, logits(model))
    assert torch.equal(logits(model), clean)
