"""Interventions that users write by hand: those that work, and errors for those that do not."""

from __future__ import annotations

import pytest
import torch
from tiny import fresh_model, tiny_tokenizer

import lirefs
from lirefs.errors import InterventionError


class Zeroed:
    """Sets a weight to zero; `undo` says whether its handle puts it back."""

    def __init__(self, undo=True, described=None):
        self.undo = undo
        self.described = {"kind": "zeroed"} if described is None else described

    def attach(self, model):
        weight = model.model.layers[1].mlp.down_proj.weight
        kept = weight.data.clone()
        weight.data.zero_()
        return Undo((lambda: weight.data.copy_(kept)) if self.undo else lambda: None)

    def describe(self):
        return self.described


class Undo:
    def __init__(self, remove):
        self.remove = remove


class Hooked(Zeroed):
    """Doubles the output of a block by a hook of PyTorch, whose handle is returned as it is."""

    def attach(self, model):
        block = model.model.layers[1].mlp
        return block.register_forward_hook(lambda module, given, out: 2 * out)


class Forgotten(Hooked):
    """Returns nothing."""

    def attach(self, model):
        super().attach(model)


class Raises(Hooked):
    """Fails after it has added a hook."""

    def attach(self, model):
        super().attach(model)
        raise ValueError("mine")


class LeavesHook(Hooked):
    def attach(self, model):
        super().attach(model)
        return Undo(lambda: None)


class ReplacesForward(Zeroed):
    def attach(self, model):
        block = model.model.layers[1].mlp
        block.forward = lambda h: 0 * h
        return Undo(lambda: None)


class Buffered(Zeroed):
    def attach(self, model):
        model.model.layers[1].count += 1
        return Undo(lambda: None)


class LaterForgets(Zeroed):
    """Restores the weight at the trial attach, and never again."""

    times = 0

    def attach(self, model):
        self.undo = self.times == 0
        self.times += 1
        return super().attach(model)


@pytest.fixture
def lm():
    return lirefs.wrap(fresh_model("llama"), tiny_tokenizer(), name="tiny")


@pytest.fixture
def task():
    return lirefs.Perplexity("texts", [("a", "some text to read"), ("b", "another text")])


def hooks(model):
    return sum(len(one._forward_hooks) + len(one._forward_pre_hooks) for one in model.modules())


def compared(lm, task, **interventions):
    return lirefs.compare(lm, interventions, [task], progress=False)


def test_a_baseline_is_that_of_the_unchanged_model(lm, task):
    plain = compared(lm, task).score("unchanged", "texts")
    found = compared(lm, task, zeroed=Zeroed(), hooked=Hooked())
    assert found.score("unchanged", "texts") == plain
    assert len({found.score(one, "texts") for one in found.variants}) == 3
    assert compared(lm, task).score("unchanged", "texts") == plain


@pytest.mark.parametrize(
    ("bad", "lost"),
    [
        (Zeroed(undo=False), r"parameter model\.layers\.1\.mlp\.down_proj\.weight"),
        (LeavesHook(), r"a hook of module model\.layers\.1\.mlp"),
        (ReplacesForward(), r"the forward method of module model\.layers\.1\.mlp"),
        (Buffered(), r"buffer model\.layers\.1\.count"),
    ],
)
def test_what_is_not_restored_is_named_before_anything_runs(lm, task, bad, lost):
    lm.model.model.layers[1].register_buffer("count", torch.zeros(2))
    ran = []
    with pytest.raises(InterventionError, match=rf"interventions\['bad'\] did not.*: {lost} is"):
        lirefs.compare(lm, {"good": Zeroed(), "bad": bad}, [task], progress=False,
                       callback=ran.append)  # fmt: skip
    assert not ran


@pytest.mark.parametrize("inside", [False, True])
def test_what_is_not_restored_after_a_run_is_named(lm, task, inside):
    bad = lirefs.compose(LaterForgets()) if inside else LaterForgets()
    ran = []
    with pytest.raises(InterventionError, match=r"interventions\['bad'\] did not restore"):
        lirefs.compare(lm, {"bad": bad, "good": Zeroed()}, [task], progress=False,
                       callback=lambda cell: ran.append(cell.variant))  # fmt: skip
    assert ran == ["unchanged", "bad"]


@pytest.mark.parametrize("around", [lambda one: one, lambda one: lirefs.compose(Zeroed(), one)])
def test_attach_must_return_a_handle(lm, task, around):
    plain = compared(lm, task).score("unchanged", "texts")
    with pytest.raises(InterventionError, match=r"Forgotten\.attach returned None.*handle"):
        compared(lm, task, bad=around(Forgotten()))
    with pytest.raises(ValueError, match="mine"):
        compared(lm, task, bad=around(Raises()))
    assert hooks(lm.model) == 0
    assert compared(lm, task).score("unchanged", "texts") == plain


def test_hooks_of_others_stay_where_attach_fails(lm, task):
    handle = lm.model.model.layers[0].register_forward_hook(lambda *given: None)
    with pytest.raises(InterventionError):
        compared(lm, task, bad=Forgotten())
    assert hooks(lm.model) == 1
    handle.remove()


def test_what_is_not_an_intervention_is_told_what_it_needs(lm, task):
    def zero(model):
        return model

    with pytest.raises(InterventionError, match=r"'f'.*attach\(model\) -> handle with remove\(\)"):
        compared(lm, task, f=zero)
    with pytest.raises(InterventionError, match=r"'c'.*the class Zeroed itself; call it: Zeroed"):
        compared(lm, task, c=Zeroed)
    with pytest.raises(InterventionError, match="the class Zeroed itself"):
        lirefs.compose(Zeroed)


@pytest.mark.parametrize(
    "described", ["text", 3, {"kind": torch.zeros(2)}, {"kind": {1, 2}}, {("a", 1): 2}]
)
def test_a_description_must_be_a_dict_of_json(lm, task, described):
    with pytest.raises(InterventionError, match=r"interventions\['odd'\]: describe\(\) must"):
        compared(lm, task, odd=Zeroed(described=described))


def test_compose_gives_a_class_of_ones_own_apply_and_plus(lm):
    mine = lirefs.compose(Hooked())
    plain = lm.generate("some text", max_new_tokens=4)
    with (mine + Zeroed()).apply(lm.model):
        assert hooks(lm.model) == 1
    assert hooks(lm.model) == 0
    assert lm.generate("some text", max_new_tokens=4) == plain
