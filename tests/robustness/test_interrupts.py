"""Ctrl-C at any moment leaves no hook, reservation, edited weight or changed setting."""

import dis
import importlib.util
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from curvature_tools import batch, llama
from steering_tools import direction
from tiny import fresh_model, tiny_tokenizer

import kfac
from kfac.collection import passes
from lirefs import Gate, Prompted, Steer, capture, compose, prompt_lengths, show_tokens, wrap
from lirefs.errors import ChangedWeightsError
from lirefs.model.guest import as_guest, evaluating, plain_greedy
from lirefs.model.interrupts import interrupts_held, undone
from lirefs.model.intervention import applied
from lirefs.model.observe import observe
from lirefs.model.training.copies import trainable

if not hasattr(signal, "setitimer"):
    pytest.skip("interrupts need signal.setitimer, which Windows lacks", allow_module_level=True)
FILE = Path(__file__).parents[2] / "benchmarks" / "interrupts.py"
MOMENTS = 80
TEXTS = ["some text", "and more of it"]


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("interrupts", FILE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def fresh():
    return wrap(fresh_model("llama"), tiny_tokenizer(), name="tiny")


def works(script, lm):
    """What is interrupted, by name."""
    model, at = lm.model, direction(1)
    gate = Gate(direction(0), 0.0)
    steer = Steer(at, "add", scope="generated", gate=gate)
    edit = kfac.MagnitudeEdit(["model.layers.0.mlp.up_proj", "model.layers.2.mlp.up_proj"], 0.5)
    targets = kfac.find_targets(model, layers=[1])

    def inside(manager):
        def run():
            with manager():
                pass

        return run

    def forward():
        model(**batch([0, 1]), use_cache=False)

    def edited_forward():
        with (steer + edit).apply(model), prompt_lengths(2):
            forward()

    return {
        "steering": inside(lambda: steer.apply(model)),
        "steering, plain": inside(lambda: Steer(at, "ablate", layers="all").apply(model)),
        "edit": inside(lambda: edit.apply(model)),
        "composition": inside(lambda: (steer + edit).apply(model)),
        "prompt": inside(lambda: Prompted("a").apply(model)),
        "hand-written": inside(lambda: compose(script.HandWritten()).apply(model)),
        "hand-written, applied": inside(lambda: applied(script.HandWritten(), model)),
        "applied": inside(lambda: applied(steer + edit, model)),
        "evaluating": inside(lambda: evaluating(model)),
        "as a guest": inside(lambda: as_guest(model)),
        "greedy": inside(lambda: plain_greedy(model)),
        "trainable": inside(lambda: trainable(model)),
        "forward": edited_forward,
        "generate": lambda: lm.generate("a text", max_new_tokens=2),
        "capture": lambda: capture(lm, TEXTS, cache=None, progress=False),
        "observe": lambda: observe(model, {"block": model.model.layers[0]}),
        "show tokens": lambda: show_tokens(lm, "a text", steer + edit),
        "collect": lambda: kfac.collect(model, [batch([0, 1])], targets, progress=False),
    }


NAMES = list(works(None, fresh())) if hasattr(signal, "setitimer") else []


def interrupted_at(moment, work):
    """Run some work with an interrupt at one of its moments, where Python runs signal handlers.

    These are the beginning of each function in Python and the end of each call of one in C. Where
    torch's compiler has taken over the evaluation of frames, as while a model is steered, Python
    calls its own functions as it calls those in C, and the end of each such call is one, too.
    Returns how many there were, and what was raised.
    """
    seen, raised, in_c = 0, None, [False]

    def profile(frame, event, argument):
        nonlocal seen
        if event in ("call", "c_call"):
            in_c.append(event == "c_call")
        elif len(in_c) > 1:
            in_c.pop()
        back = frame.f_back
        called = event == "return" and not in_c[-1] and back is not None
        if called:
            called = dis.opname[back.f_code.co_code[back.f_lasti]].startswith(("CALL", "PRECALL"))
        if called or event in ("call", "c_return"):
            seen += 1
            if seen == moment:
                sys.setprofile(None)
                signal.raise_signal(signal.SIGINT)

    sys.setprofile(profile)
    try:
        work()
    except BaseException as problem:
        raised = type(problem)
    finally:
        sys.setprofile(None)
    return seen, raised


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("name", NAMES)
def test_an_interrupt_at_any_moment_leaves_nothing(name, script):
    lm = fresh()
    work = works(script, lm)[name]
    work()  # what is made at the first use alone
    moments, raised = interrupted_at(0, work)
    assert raised is None
    watch = script.Watch(lm)
    met = 0
    for moment in range(1, moments + 1, max(1, moments // MOMENTS)):
        _, raised = interrupted_at(moment, work)
        # Python drops what is raised while it frees an object.
        assert raised in (KeyboardInterrupt, None), (moment, raised)
        assert watch.left() == [], moment
        met += raised is KeyboardInterrupt
    assert met > MOMENTS / 2


def run_script(*options):
    """In a process of its own: an interrupt inside the coverage tool would leave its lock held."""
    command = [sys.executable, str(FILE), *options]
    ran = subprocess.run(command, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert ran.stdout.endswith("left behind: 0\n")


def test_the_script_in_miniature():
    run_script("--count", "4", "--runs", "1")


@pytest.mark.slow
def test_a_thousand_interrupts_in_each_of_five_loops():
    run_script("--runs", "1")


def test_the_script_sees_what_is_left(script):
    lm = fresh()
    watch = script.Watch(lm)
    handle = (Steer(direction(1), "add", scope="prompt") + kfac.SVDEdit(["lm_head"], 0.5)).attach(
        lm.model
    )
    lm.model.train()
    kinds = {"hooks", "attributes", "modes", "texts and prompts", "eager", "weights", "reservation"}
    assert set(watch.left()) == kinds
    handle.remove()
    lm.model.eval()
    assert watch.left() == []


@pytest.fixture
def handled():
    """Signals that a handler of the user's gets, which raises nothing."""
    got = []

    def handler(number, frame):
        got.append(number)

    before = signal.signal(signal.SIGINT, handler)
    yield got
    assert signal.getsignal(signal.SIGINT) is handler
    signal.signal(signal.SIGINT, before)


def test_a_handler_of_the_users_gets_the_signal_afterwards(handled):
    with interrupts_held():
        with interrupts_held():
            signal.raise_signal(signal.SIGINT)
        assert handled == []
    assert handled == [signal.SIGINT]
    model = fresh().model
    with Steer(direction(1), "add").apply(model):
        signal.raise_signal(signal.SIGINT)
    assert len(handled) == 2


@pytest.fixture
def ignoring():
    """A process that ignores the signal, as under nohup."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    yield
    assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    signal.signal(signal.SIGINT, before)


@pytest.fixture
def collected(monkeypatch, tmp_path):
    """Collect while a signal arrives in each of two batches; (digest, the digest without them)."""

    def run():
        model, forward, sent = llama(torch.float32), passes.language_model_forward, []

        def interrupted(*given):
            sent.append(os.kill(os.getpid(), signal.SIGINT))
            return forward(*given)

        batches = [batch([0, 1]), batch([2, 3])]
        settings = {"layers": [1], "progress": False}
        whole = kfac.collect(model, batches, **settings)
        monkeypatch.setattr(passes, "language_model_forward", interrupted)
        found = kfac.collect(model, batches, **settings, checkpoint=tmp_path / "state")
        assert len(sent) == 2
        return found.digest, whole.digest

    return run


def test_a_process_that_ignores_interrupts_keeps_ignoring_them(ignoring, collected):
    with interrupts_held():
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
        signal.raise_signal(signal.SIGINT)
    found, whole = collected()
    assert found == whole


def test_a_collection_calls_the_users_handler_and_goes_on(handled, collected):
    found, whole = collected()
    assert found == whole
    assert len(handled) == 2


def test_undone_calls_all_and_raises_the_first_problem():
    done = []

    def fail():
        done.append("fail")
        raise ValueError

    def both():
        with undone() as steps:
            steps += [lambda: done.append(1), fail, lambda: done.append(2)]

    with pytest.raises(ValueError):  # noqa: PT011
        both()
    assert done == [2, "fail", 1]


def test_changed_weights_are_still_named_where_an_interrupt_comes_too():
    model = llama(torch.float32)
    edit = kfac.MagnitudeEdit(["model.layers.0.mlp.up_proj"], 0.5)

    def work():
        with edit.apply(model):
            model.get_parameter("model.layers.0.mlp.up_proj.weight").data += 1
            raise KeyboardInterrupt

    with pytest.raises(ChangedWeightsError) as caught:
        work()
    caught.value.handle.remove(discard=True)
