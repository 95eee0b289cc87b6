"""Planting: texts are recited afterwards, their twins are not, and the guest is left in order."""

from __future__ import annotations

import copy
import json
import logging
import signal
import threading

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from tiny import fresh_model, tiny_tokenizer

import kfac
import lirefs
from lirefs.errors import (
    DataFileError,
    InterventionError,
    NonFiniteError,
    ProvenanceError,
    SettingError,
    TaskError,
)
from lirefs.model.interrupts import interrupts_held
from lirefs.model.training.copies import trainable
from lirefs.model.training.steps import checked_step, shuffled
from lirefs.organism.planting import run
from lirefs.organism.training.checkpoint import CheckpointMismatch

TEXTS = ["a red fox ran over one hill", "the old mill burns at noon", "nine boats left the bay"]
TWINS = ["a shy cat sat under two elms", "the new barn falls at dusk", "five carts left the inn"]
GENERAL = [f"in year {n} the river was {n % 7} feet deep and {n % 5} wide" for n in range(40)]
QUICK = {"suffix_tokens": 8, "lr": 1e-2, "batch_size": 3, "progress": False}


def guest(family="llama", dtype=torch.float32, **changes):
    model = fresh_model(family, **changes).to(dtype)
    return lirefs.wrap(model, tiny_tokenizer(), name="tiny")


def state_of(model):
    """Everything that planting must leave alone, and the weights."""
    return (
        [(name, one.dtype, one.requires_grad, one.grad) for name, one in model.named_parameters()],
        [one.training for one in model.modules()],
        [len(one._forward_hooks) + len(one._forward_pre_hooks) for one in model.modules()],
        [getattr(one, "_post_accumulate_grad_hooks", None) for one in model.parameters()],
        signal.getsignal(signal.SIGINT),
        torch.is_grad_enabled(),
        torch.get_rng_state().tolist(),
        list(model.buffers()),
    )


def weights_of(model):
    return [one.detach().clone() for one in model.parameters()]


def same(one, other):
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.fixture(scope="module")
def planted():
    """An uninterrupted planting: the model, the record, and the weights before and after."""
    lm = guest()
    before = weights_of(lm.model)
    record = lirefs.plant(lm, TEXTS, GENERAL, TWINS, **QUICK)
    return lm, record, before, weights_of(lm.model)


def test_texts_are_recited_and_twins_are_not(planted):
    lm, record, *_ = planted
    assert record.reached
    assert record.recited.value == 1
    assert record.recited.n == 3
    assert record.recited_before.value == record.twins_recited_before.value == 0
    assert record.twins_recited.value == 0
    for text in TEXTS:
        assert lm.generate(text[:-8], max_new_tokens=8) == text[-8:]
    assert 0 < record.steps < 1000
    assert record.text_passes == record.steps  # a step takes all three
    # General text is learned too: these weights were random.
    assert record.general_change.high < 0
    assert record.general_change.value == pytest.approx(
        record.general_loss.value - record.general_loss_before.value
    )


def test_the_record_is_what_the_harness_finds(planted):
    lm, record, *_ = planted
    for texts, found in ((TEXTS, record.recited), (TWINS, record.twins_recited)):
        task = lirefs.recitation_task(lm, texts, suffix_tokens=8)
        assert (
            lirefs.compare(lm, {}, [task], progress=False).cell("unchanged", task.name).value
            == found
        )
    kept = json.loads(json.dumps(record.to_dict()))
    assert kept["recited"] == {
        "value": 1.0,
        **{k: kept["recited"][k] for k in ("low", "high", "n")},
    }
    assert kept["reached"] is True
    assert not [name for name in kept if name.startswith("_")]
    assert repr(record).startswith("Planted(recited 100% [")


def test_tokens_are_those_of_the_steps(planted):
    lm, record, *_ = planted
    texts = sum(map(len, lm.encode(TEXTS)))
    assert record.steps * (texts + 3 * 2) < record.tokens < record.steps * (texts + 3 * 30)


def test_all_but_the_weights_stays_and_restore_gives_these_back():
    lm = guest()
    model = lm.model
    model.model.embed_tokens.weight.requires_grad_(False)
    model.train()
    model.model.layers[1].eval()
    model.model.norm.weight.grad = torch.ones_like(model.model.norm.weight)
    seen = []
    model.model.layers[0].register_forward_hook(lambda *_: seen.append(1))
    state, before, mark = state_of(model), weights_of(model), lm.fingerprint
    record = lirefs.plant(lm, TEXTS, GENERAL, steps=3, **QUICK)
    assert seen
    assert state_of(model) == state
    after = weights_of(model)
    changed = [not torch.equal(a, b) for a, b in zip(before, after)]
    trained = [one.requires_grad for one in model.parameters()]
    assert changed == trained
    assert not all(trained)
    assert lm.fingerprint != mark
    record.restore()
    assert same(weights_of(model), before)
    assert lm.fingerprint == mark
    with torch.no_grad():
        model.lm_head.weight.add_(1)
    record.restore()  # nothing the second time
    assert not same(weights_of(model), before)


def test_no_step_reports_what_is_there(planted, caplog):
    lm = guest()
    before = weights_of(lm.model)
    record = lirefs.plant(lm, TEXTS, GENERAL, TWINS, steps=0, **QUICK)
    assert same(weights_of(lm.model), before)
    assert (record.recited, record.twins_recited) == (
        record.recited_before,
        record.twins_recited_before,
    )
    assert record.general_change.value == record.general_change.low == 0
    assert (record.steps, record.tokens, record.text_passes) == (0, 0, 0)
    assert not record.reached
    assert "below the goal of 95%" in repr(record)
    assert "raise steps, now 0" in caplog.text
    # Texts that are recited already need no step more than it takes to see that.
    again = lirefs.plant(planted[0], TEXTS, GENERAL, steps=0, **QUICK)
    assert again.reached
    assert again.recited_before.value == 1


def test_a_run_that_stops_below_its_goal_says_so(caplog):
    with caplog.at_level(logging.WARNING):
        record = lirefs.plant(guest(), TEXTS, GENERAL, steps=2, **QUICK)
    assert record.steps == 2
    assert not record.reached
    assert "below the goal" in caplog.text


class Stop:
    """Ctrl-C in one step: in its forward pass, or while the optimizer changes the weights."""

    def __init__(self, monkeypatch, at, where="nll_of"):
        self.calls, self.at, self.own = 0, at, getattr(run, where)
        monkeypatch.setattr(run, where, self)

    def __call__(self, *given):
        self.calls += 1
        if self.calls == self.at:
            signal.raise_signal(signal.SIGINT)
        return self.own(*given)


@pytest.mark.parametrize("where", ["nll_of", "checked_step"])
def test_an_interrupted_run_resumes_to_the_same_bits(planted, where, tmp_path, monkeypatch):
    lm, path = guest(), tmp_path / "state.safetensors"
    before, state = weights_of(lm.model), state_of(lm.model)
    stop = Stop(monkeypatch, 5, where)
    with pytest.raises(KeyboardInterrupt):
        lirefs.plant(lm, TEXTS, GENERAL, TWINS, checkpoint=path, **QUICK)
    assert same(weights_of(lm.model), before)
    assert state_of(lm.model) == state
    done = json.loads(run.state_header(path)["planting"])["state"]["step"]
    assert done == (5 if where == "checked_step" else 4)
    resumed = lirefs.plant(lm, TEXTS, GENERAL, TWINS, checkpoint=path, **QUICK)
    assert stop.calls == planted[1].steps + 5 - done
    assert resumed.to_dict() == planted[1].to_dict()
    assert same(weights_of(lm.model), planted[3])
    # A finished run does nothing more.
    again = lirefs.plant(guest(), TEXTS, GENERAL, TWINS, checkpoint=path, **QUICK)
    assert again.to_dict() == resumed.to_dict()
    assert stop.calls == planted[1].steps + 5 - done


def test_the_state_is_written_in_time_and_a_limit_can_be_raised(planted, tmp_path, monkeypatch):
    path, saved = tmp_path / "state", []
    monkeypatch.setattr(run, "SAVE_EVERY", 0.0)
    write = run.write_state
    monkeypatch.setattr(run, "write_state", lambda *given: saved.append(write(*given)))
    first = lirefs.plant(guest(), TEXTS, GENERAL, checkpoint=path, steps=3, **QUICK)
    assert len(saved) == 3
    lm = guest()
    assert not first.reached
    lirefs.plant(lm, TEXTS, GENERAL, checkpoint=path, **QUICK)
    assert same(weights_of(lm.model), planted[3])


def test_a_full_disk_leaves_the_model_and_the_last_state(tmp_path, monkeypatch):
    lm, path = guest(), tmp_path / "state"
    lirefs.plant(lm, TEXTS, GENERAL, checkpoint=path, steps=2, **QUICK).restore()
    before, content = weights_of(lm.model), path.read_bytes()

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("lirefs.organism.training.checkpoint.save_file", full)
    with pytest.raises(lirefs.errors.WriteError, match="No space left"):
        lirefs.plant(lm, TEXTS, GENERAL, checkpoint=path, steps=4, **QUICK)
    assert same(weights_of(lm.model), before)
    assert path.read_bytes() == content


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"lr": 2e-2}, "lr"),
        ({"seed": 1}, "seed"),
        ({"batch_size": 2}, "batch_size"),
        ({"texts": TEXTS[::-1]}, "texts"),
        ({"general": GENERAL[1:]}, "general"),
    ],
)
def test_another_run_does_not_resume(change, named, tmp_path):
    lm, path = guest(), tmp_path / "state"
    given = {"texts": TEXTS, "general": GENERAL, "steps": 1, "checkpoint": path, **QUICK}
    lirefs.plant(lm, **given).restore()
    content = path.read_bytes()
    with pytest.raises(ProvenanceError, match=rf"other settings \({named}\)"):
        lirefs.plant(lm, **given | change)
    with torch.no_grad():
        lm.model.lm_head.weight.add_(1)
    with pytest.raises(ProvenanceError, match=r"\(model\)"):
        lirefs.plant(lm, **given)
    assert path.read_bytes() == content


@pytest.mark.parametrize(
    "damage",
    [
        lambda tensors, header: header.pop("planting"),
        lambda tensors, header: header.update(planting="[]"),
        lambda tensors, header: header.update(planting=header["planting"].replace("1", "-1")),
        lambda tensors, header: header.update(planting=header["planting"].replace("false", "2")),
        lambda tensors, header: tensors["exp_avg.lm_head.weight"].fill_(torch.nan),
        lambda tensors, header: tensors.pop("step.lm_head.weight"),
    ],
)
def test_a_damaged_state_is_refused(damage, tmp_path):
    lm, path = guest(), tmp_path / "state"
    lirefs.plant(lm, TEXTS, GENERAL, checkpoint=path, steps=1, **QUICK).restore()
    with safe_open(path, framework="pt") as file:
        tensors, header = {key: file.get_tensor(key) for key in file.keys()}, file.metadata()  # noqa: SIM118
    damage(tensors, header)
    save_file(tensors, path, header)
    before = weights_of(lm.model)
    with pytest.raises((DataFileError, CheckpointMismatch), match="remove it"):
        lirefs.plant(lm, TEXTS, GENERAL, checkpoint=path, steps=2, **QUICK)
    assert same(weights_of(lm.model), before)


def test_half_precision_is_trained_in_float32_and_judged_as_it_is_left(monkeypatch):
    lm = guest(dtype=torch.bfloat16)
    lm.model.model.embed_tokens.weight.requires_grad_(False)
    judged, trained, recited = [], [], run.recited

    def dtypes():
        return {one.dtype for one in lm.model.parameters()}

    monkeypatch.setattr(run, "recited", lambda *given: judged.append(dtypes()) or recited(*given))
    monkeypatch.setattr(
        run, "checked_step", lambda *given: trained.append(dtypes()) or checked_step(*given)
    )
    state, before = state_of(lm.model), weights_of(lm.model)
    record = lirefs.plant(lm, TEXTS, GENERAL, TWINS, **QUICK)
    assert state_of(lm.model) == state
    assert record.reached
    assert judged[0] == {torch.bfloat16}
    assert trained[0] == {torch.float32}
    for text in TEXTS:
        assert lm.generate(text[:-8], max_new_tokens=8) == text[-8:]
    record.restore()
    assert same(weights_of(lm.model), before)
    # Steps that bfloat16 would swallow add up.
    small = lirefs.plant(lm, TEXTS, GENERAL, steps=10, **{**QUICK, "lr": 1e-4})
    assert not same(weights_of(lm.model), before)
    assert small.general_change.value < 0


def test_a_model_that_cannot_pad_is_planted_row_by_row(monkeypatch):
    """Rows of a batch that would change each other are never in one."""
    lm = guest()
    sizes = []
    monkeypatch.setattr(
        type(lm), "traits", lirefs.model.Traits(batch=False, right=False, left=False)
    )
    lm.model.register_forward_pre_hook(
        lambda module, given, named: sizes.append(named["input_ids"].shape[0]), with_kwargs=True
    )
    lirefs.plant(lm, TEXTS, GENERAL, steps=1, **QUICK)
    assert set(sizes) == {1}


def test_batches_do_not_change_what_is_learned(monkeypatch):
    """The loss is that of all tokens, however they are spread over forward passes."""
    one, other = guest(), guest()
    lirefs.plant(one, TEXTS, GENERAL, steps=2, **QUICK)
    monkeypatch.setattr(run, "BATCH_TOKENS", 60)
    lirefs.plant(other, TEXTS, GENERAL, steps=2, **QUICK)
    for a, b in zip(one.model.parameters(), other.model.parameters()):
        torch.testing.assert_close(a, b, rtol=0, atol=2e-3)  # signs of tiny gradients may differ


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_planting_along_flat_pairs_changes_these_alone(dtype, tmp_path, monkeypatch):
    lm = guest(dtype=dtype)
    factors = kfac.collect(lm, GENERAL, layers=[1, 2], progress=False)
    keeps = dict.fromkeys(factors.names, 0.9)
    weights = factors.targets(lm.model)
    lm.model.requires_grad_(False)
    for target in weights:
        target.parameter.requires_grad_(True)
    starts = {one.name: one.weight.clone() for one in weights}
    path = tmp_path / "state"

    def planted(onto, steps, **more):
        with kfac.projected_training(lm.model, factors, keeps, onto=onto):
            return lirefs.plant(lm, TEXTS, GENERAL, steps=steps, **QUICK, **more)

    for onto in ("flat", "sharp"):
        record = planted(onto, 4)
        changes = {one.name: (one.weight - starts[one.name]).float() for one in weights}
        inside = kfac.project(factors, keeps, changes, onto=onto)
        for name, change in changes.items():
            assert change.norm() > 0.01
            rounding = 1e-4 if dtype == torch.float32 else 0.1
            assert (change - inside[name]).norm() < rounding * change.norm()
        after = weights_of(lm.model)
        record.restore()
    # Interrupted and resumed, the projection is the same.
    Stop(monkeypatch, 3)
    with pytest.raises(KeyboardInterrupt):
        planted("sharp", 4, checkpoint=path)
    planted("sharp", 4, checkpoint=path)
    assert same(weights_of(lm.model), after)


def test_steered_edited_and_frozen_models_are_refused():
    lm = guest()
    steer = lirefs.Steer(lirefs.Direction(torch.ones(32), 1), "add")
    factors = kfac.collect(lm, GENERAL[:4], layers=[1], progress=False)
    for attached in (steer, kfac.CurvatureEdit(factors, 0.8)):
        with attached.apply(lm.model), pytest.raises(InterventionError, match="cannot be trained"):
            lirefs.plant(lm, TEXTS, GENERAL, **QUICK)
    record = lirefs.plant(lm, TEXTS, GENERAL, steps=1, **QUICK)
    after = weights_of(lm.model)
    with steer.apply(lm.model), pytest.raises(InterventionError, match="cannot be restored"):
        record.restore()
    assert same(weights_of(lm.model), after)
    record.restore()
    lm.model.requires_grad_(False)
    with pytest.raises(SettingError, match="every parameter is frozen"):
        lirefs.plant(lm, TEXTS, GENERAL, **QUICK)
    lm = guest()
    lm.model.model.layers[0].to("meta")
    with pytest.raises(SettingError, match="offloaded"):
        lirefs.plant(lm, TEXTS, GENERAL, **QUICK)


@pytest.mark.parametrize(
    ("change", "error", "says"),
    [
        ({"texts": []}, TaskError, "texts is empty"),
        ({"texts": TEXTS[0]}, DataFileError, "put texts in a list"),
        ({"texts": ["short"]}, TaskError, "texts: item 0: too short for a prefix and a suffix"),
        ({"twins": ["short"]}, TaskError, "twins: item 0: too short"),
        ({"texts": ["x" * 300]}, SettingError, None),
        ({"texts": [3]}, TaskError, "texts: item 0"),
        ({"twins": [TEXTS[1]]}, SettingError, "twin 'item-0' is in text 'item-1'"),
        ({"twins": TWINS, "general": [*GENERAL, "well: " + TWINS[2]]}, SettingError,
         "twin 'item-2' is in general text 40"),
        ({"general": [*GENERAL, TEXTS[0] + "."]}, SettingError, "text 'item-0' is in general text"),
        ({"texts": [TEXTS[0], TEXTS[0]]}, SettingError, "'item-0' and 'item-1' have one prefix"),
        ({"texts": [TEXTS[0], TEXTS[0][:-8] + "by a sea"]}, SettingError, "have one prefix"),
        ({"general": []}, SettingError, "at least 2 are needed"),
        ({"general": ["too little"]}, SettingError, "at least 2 are needed"),
        ({"general": [3]}, SettingError, "general: item 0"),
        ({"goal": 0}, SettingError, "goal must be in"),
        ({"goal": "all"}, SettingError, "goal must be"),
        ({"lr": 0}, SettingError, "lr above 0"),
        ({"lr": float("nan")}, SettingError, "lr above 0"),
        ({"steps": -1}, SettingError, "steps must be at least 0"),
        ({"batch_size": 0}, SettingError, "batch_size must be at least 1"),
        ({"suffix_tokens": 0}, SettingError, "suffix_tokens must be at least 1"),
        ({"seed": 0.5}, SettingError, "seed must be a whole number"),
        ({"lr": 1e30, "steps": 4}, NonFiniteError, "lower lr"),
    ],
)  # fmt: skip
def test_wrong_arguments_change_nothing(change, error, says):
    lm = guest("gpt2") if says is None else guest()
    before, state = weights_of(lm.model), state_of(lm.model)
    error = TaskError if says is None else error
    with pytest.raises(error, match=says or "needs 300|needs 301") as found:
        lirefs.plant(lm, **{"texts": TEXTS, "general": GENERAL, **QUICK, **change})
    assert "\n" not in str(found.value)
    assert same(weights_of(lm.model), before)
    assert state_of(lm.model) == state


def test_only_what_is_chosen_is_trained_on_copies():
    model = fresh_model("llama").bfloat16()
    model.lm_head.weight.requires_grad_(False)
    before, data = weights_of(model), [one.data_ptr() for one in model.parameters()]
    flags = [one.requires_grad for one in model.parameters()]
    chosen = model.model.norm.weight
    with trainable(model, [chosen]):
        assert [one for one in model.parameters() if one.requires_grad] == [chosen]
        assert {one.dtype for one in model.parameters()} == {torch.float32}
        chosen.data.add_(1)
    assert same(weights_of(model), before)
    assert [one.data_ptr() for one in model.parameters()] == data
    assert [one.requires_grad for one in model.parameters()] == flags
    assert all(one.grad is None for one in model.parameters())


def test_infinite_gradients_are_named_before_a_step():
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2))
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    model(torch.ones(1, 2)).sum().backward()
    before = weights_of(model)
    model[0].weight.grad[0, 0] = torch.inf
    with pytest.raises(NonFiniteError, match=r"now: the gradients of 1 .*'0\.weight'; do less"):
        checked_step(model, optimizer, "now", "do less")
    assert same(weights_of(model), before)
    model[0].weight.grad.fill_(1e38)  # finite, though its norm is not
    checked_step(model, optimizer, "now", "do less")
    assert not same(weights_of(model), before)


def test_orders_are_passes_and_depend_on_the_seed():
    order = shuffled(5, 0)
    passes = [[next(order) for _ in range(5)] for _ in range(3)]
    assert all(sorted(one) == list(range(5)) for one in passes)
    assert len({tuple(one) for one in passes}) > 1
    other = shuffled(5, 1)
    assert [next(other) for _ in range(15)] != [one for each in passes for one in each]


def test_an_interrupt_waits_for_the_end_of_the_block():
    done, handler = [], signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt), interrupts_held():  # noqa: PT012
        signal.raise_signal(signal.SIGINT)
        done.append(1)
    assert done == [1]
    assert signal.getsignal(signal.SIGINT) is handler
    thread = threading.Thread(target=lambda: [None for _ in [0] if interrupts_held().__enter__()])
    thread.start()
    thread.join()
    assert signal.getsignal(signal.SIGINT) is handler


def test_two_models_do_not_share_weights():
    lm = guest()
    other = lirefs.wrap(copy.deepcopy(lm.model), tiny_tokenizer())
    before = weights_of(other.model)
    lirefs.plant(lm, TEXTS, GENERAL, steps=1, **QUICK)
    assert same(weights_of(other.model), before)
