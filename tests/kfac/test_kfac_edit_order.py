"""An edit that is left before a later one is refused, and taken out with the later one."""

import functools
from contextlib import ExitStack

import pytest
import torch
from tiny import fresh_model, tiny_tokenizer

import kfac
from lirefs import Direction, Steer, wrap
from lirefs.errors import EditOrderError, InterventionError


@pytest.fixture
def model():
    return fresh_model("llama")


@functools.cache
def factors():
    return kfac.collect(
        wrap(fresh_model("llama"), tiny_tokenizer()),
        ["some text here", "another one"],
        layers=[1],
        progress=False,
    )


def edit(keep):
    return kfac.CurvatureEdit(factors(), keep=keep)


def weights(model):
    return [parameter.detach().clone() for parameter in model.parameters()]


def same(model, before):
    return all(torch.equal(*pair) for pair in zip(model.parameters(), before, strict=True))


def entered(intervention, model):
    context = intervention.apply(model)
    context.__enter__()
    return lambda: context.__exit__(None, None, None)


STEER = Steer(Direction(torch.ones(32), 1), "add")
LATER = {
    "a with": lambda model: entered(edit(0.9), model),
    "a handle": lambda model: edit(0.9).attach(model).remove,
    "a composition": lambda model: entered(STEER + edit(0.9), model),
    "a handle of a composition": lambda model: (edit(0.9) + STEER).attach(model).remove,
}


@pytest.mark.parametrize("later", LATER)
@pytest.mark.parametrize("first", ["edit", "composition"])
def test_the_earlier_edit_goes_with_the_later_one(model, first, later):
    before = weights(model)
    leave = entered(edit(0.5) if first == "edit" else STEER + edit(0.5), model)
    remove = LATER[later](model)
    with pytest.raises(EditOrderError):
        leave()
    assert not same(model, before)
    remove()
    assert same(model, before)
    with edit(0.7).apply(model):  # nothing lingers
        assert not same(model, before)
    assert same(model, before)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize("order", ["01", "10", "0", "1"])
def test_three_edits_left_in_any_order(model, order):
    before = weights(model)
    leave = [entered(edit(keep), model) for keep in (0.5, 0.7, 0.9)]
    for one in map(int, order):
        with pytest.raises(EditOrderError):
            leave[one]()
    leave[2]()
    for one in {0, 1} - set(map(int, order)):
        leave[one]()
    assert same(model, before)


def test_a_steering_between_does_not_take_it_out_too_early(model):
    before = weights(model)
    leave = entered(edit(0.5), model)
    later = edit(0.9).attach(model)
    with pytest.raises(EditOrderError):
        leave()
    with STEER.apply(model):  # its end tries, in vain
        pass
    with edit(0.8).apply(model):
        pass
    assert not same(model, before)
    later.remove()
    assert same(model, before)


def test_an_error_inside_is_not_lost(model):
    before = weights(model)
    with ExitStack() as stack:
        context = edit(0.5).apply(model)
        context.__enter__()
        stack.enter_context(edit(0.9).apply(model))
        with pytest.raises(EditOrderError) as caught:
            context.__exit__(KeyError, KeyError("inside"), None)
        assert isinstance(caught.value.__context__, KeyError)
    assert same(model, before)


def test_the_thread_that_holds_a_late_edit_is_free_in_the_end(model):
    leave = entered(edit(0.5), model)
    later = edit(0.9).attach(model)
    with pytest.raises(EditOrderError):
        leave()
    later.remove()
    with pytest.raises(InterventionError, match=r"give lm\.model"):
        STEER.attach(wrap(model, tiny_tokenizer()))
    STEER.attach(model).remove()
