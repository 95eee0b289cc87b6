"""Laws of models under steering: any padding and cache, any batch, any nesting."""

from __future__ import annotations

import functools
import itertools
from contextlib import suppress

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tiny import fresh_model, tiny_tokenizer
from transformers import DynamicCache

from kfac.edits.weight_edit import WeightEdit
from kfac.targets import find_targets
from lirefs import Direction, Gate, Schedule, Steer, capture, compose, prompt_lengths, wrap
from lirefs.errors import EditOrderError, LirefsError
from lirefs.steering import scope

PADDING = 2


def law(examples):
    return settings(max_examples=examples, deadline=None, derandomize=True, database=None)


@functools.cache
def model_of(family):
    return wrap(fresh_model(family, num_hidden_layers=2), tiny_tokenizer())


# Scopes: the steered tokens, found from the hidden states.


@st.composite
def texts(draw):
    """Token ids of prompts and of their continuations, which have the same length in all rows."""
    generated = draw(st.integers(0, 4))
    token = st.integers(3, 100)
    return [
        (
            draw(st.lists(token, min_size=1, max_size=6)),
            draw(st.lists(token, min_size=generated, max_size=generated)),
        )
        for _ in range(draw(st.integers(1, 3)))
    ]


@st.composite
def scopes(draw, rows):
    """A scope, and what it promises for token `position` of `row`, whose prompt has `length`."""
    n = draw(st.integers(1, 5))
    marks = [draw(st.lists(st.booleans(), min_size=1, max_size=len(prompt))) for prompt, _ in rows]
    return draw(
        st.sampled_from(
            [
                (scope.all_tokens(), lambda row, position, length: True),
                (scope.prompt(), lambda row, position, length: position < length),
                (scope.generated(), lambda row, position, length: position >= length),
                (scope.last_prompt_token(), lambda row, position, length: position == length - 1),
                (
                    scope.first_generated(n),
                    lambda row, position, length: length <= position < length + n,
                ),
                (scope.from_position(n), lambda row, position, length: position >= n),
                (
                    scope.mask(marks),
                    lambda row, position, length: (
                        position < len(marks[row]) and marks[row][position]
                    ),
                ),
            ]
        )
    )


def touched(lm, steer, rows, side, cuts):
    """The steered tokens as (row, position) of the unpadded text, without padding."""
    wide = max(len(prompt) for prompt, _ in rows)
    ids, real = [], []
    for prompt, generated in rows:
        padding = [PADDING] * (wide - len(prompt))
        padded = padding + prompt if side == "left" else prompt + padding
        ids.append(padded + generated)
        real.append([token != PADDING for token in padded] + [True] * len(generated))
    ids, mask = torch.tensor(ids), torch.tensor(real).long()
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    before, after = [], []
    blocks = lm.model.model.layers
    hooks = [
        blocks[0].register_forward_hook(
            lambda _, args, out: before.append(out[0] if isinstance(out, tuple) else out)
        )
    ]
    with steer.apply(lm.model), torch.no_grad():
        hooks.append(blocks[1].register_forward_pre_hook(lambda _, args: after.append(args[0])))
        with prompt_lengths([len(prompt) for prompt, _ in rows]):
            cache = DynamicCache(config=lm.model.config)
            for begin, end in itertools.pairwise([0, *cuts, ids.shape[1]]):
                lm.model(
                    ids[:, begin:end],
                    attention_mask=mask[:, :end],
                    position_ids=positions[:, begin:end],
                    past_key_values=cache,
                )
    for hook in hooks:
        hook.remove()
    changed = (torch.cat(before, dim=1) != torch.cat(after, dim=1)).any(dim=-1)
    return {
        (row, int(positions[row, column]))
        for row, column in changed.nonzero().tolist()
        if mask[row, column]
    }


@law(120)
@given(st.data())
def test_scopes_do_not_depend_on_padding_chunks_or_cache(data):
    rows = data.draw(texts(), "rows")
    chosen, promised = data.draw(scopes(rows), "scope")
    side = data.draw(st.sampled_from(["left", "right"]), "side")
    columns = max(len(prompt) for prompt, _ in rows) + len(rows[0][1])
    cuts = sorted(data.draw(st.sets(st.integers(1, max(columns - 1, 1)), max_size=4), "cuts"))
    cuts = [cut for cut in cuts if cut < columns]
    lm = model_of("llama")
    steer = Steer(Direction(torch.full((32,), 3.0), 1), "add", scope=chosen)
    expected = {
        (row, position)
        for row, (prompt, generated) in enumerate(rows)
        for position in range(len(prompt) + len(generated))
        if promised(row, position, len(prompt))
    }
    assert touched(lm, steer, rows, side, cuts) == expected
    if chosen.ends is None:  # depends on the rows of the batch
        alone = [touched(lm, steer, [row], side, []) for row in rows]
        assert {(row, at) for row, found in enumerate(alone) for _, at in found} == expected


@law(25)
@given(texts(), st.sampled_from(["left", "right"]), st.integers(1, 5))
def test_a_schedule_and_rows_reach_the_tokens_they_name(rows, side, n):
    lm = model_of("llama")
    one = Direction(torch.full((32,), 3.0), 1)
    values = [1.0 if index % 2 else 0.0 for index in range(n)]
    lengths = [len(prompt) for prompt, _ in rows]
    count = len(rows[0][1])
    expected = {
        (row, length + index)
        for row, length in enumerate(lengths)
        for index in range(min(n, count))
        if values[index]
    }
    columns = max(lengths) + count
    for cuts in ([], list(range(1, columns))):
        assert touched(lm, Steer(one, "add", Schedule(values)), rows, side, cuts) == expected
        strengths = [None if row % 2 else 1.0 for row in range(len(rows))]
        found = touched(lm, Steer(one, "add", strengths), rows, side, cuts)
        assert found == {
            (row, position)
            for row, length in enumerate(lengths)
            for position in range(length + count)
            if strengths[row]
        }


# Capture: the states of a prompt do not depend on its batch.


@law(40)
@given(
    st.sampled_from(["llama", "gpt2", "opt"]),
    st.lists(st.lists(st.integers(3, 100), min_size=1, max_size=9), min_size=1, max_size=7),
    st.integers(1, 40),
    st.sampled_from(["left", "right"]),
    st.data(),
)
def test_a_prompt_has_the_same_states_in_a_batch_and_alone(family, prompts, budget, side, data):
    lm = model_of(family)
    shortest = min(map(len, prompts))
    positions = data.draw(
        st.lists(st.integers(-shortest, shortest - 1), min_size=1, max_size=3), "positions"
    )
    sites = data.draw(
        st.lists(
            st.sampled_from(["resid_pre", "attn_out", "mlp_out", "resid_post"]),
            min_size=1,
            max_size=3,
            unique=True,
        ),
        "sites",
    )
    settings = {"sites": sites, "positions": positions, "progress": False}
    together = capture(lm, prompts, batch_tokens=budget, padding_side=side, **settings)
    assert together.values.shape == (len(prompts), 2 * len(sites), len(positions), 32)
    for row, prompt in enumerate(prompts):
        alone = capture(lm, [prompt], **settings)
        torch.testing.assert_close(together.values[row], alone.values[0], atol=1e-4, rtol=1e-4)
    order = data.draw(st.permutations(range(len(prompts))), "order")
    mixed = capture(lm, [prompts[i] for i in order], batch_tokens=budget, **settings)
    torch.testing.assert_close(mixed.values, together.values[list(order)], atol=1e-4, rtol=1e-4)


# Nesting: whatever is attached and however it is removed, nothing remains.


class Scaled(WeightEdit):
    kind = "scaled"

    def __init__(self, factor):
        self.factor = factor

    def prepare(self, model):
        return [(one, one.weight * self.factor) for one in find_targets(model, [0])]

    def describe(self):
        return {"kind": self.kind, "factor": self.factor}


class Oops(Exception):
    pass


def intervention_of(number):
    one = Direction(torch.randn(32, generator=torch.Generator().manual_seed(number)), number % 2)
    gate = Gate(Direction(torch.ones(32), 0), 0.0, per="row" if number % 3 else "token")
    return [
        Steer(one, "add"),
        Steer(one, "ablate", layers="all", sites=("resid_pre", "mlp_out")),
        Steer(one, "clamp", 2.0, scope="last_prompt_token"),
        Steer(one, "add", [1.0, None], scope="prompt"),
        Steer(one, "amplify", 0.5, gate=gate) if number % 2 else Steer(one, "add", 0.0),
        Steer(one, "add", Schedule([1.0, 2.0])),
        Scaled(0.5),
        compose(Steer(one, "add"), Scaled(2.0), Steer(one, "ablate")),
        compose(Scaled(2.0), Steer(one, "add", layers=[7])),  # fails halfway
        Steer(one, "add", [1.0, 2.0, 3.0]),  # fails when the model runs
    ][number % 10]


def everything(model):
    """Everything that an intervention could leave behind."""
    return (
        {name: (id(value), value.data_ptr()) for name, value in model.named_parameters()},
        {
            name: (list(module._forward_hooks), list(module._forward_pre_hooks), module.training)
            for name, module in model.named_modules()
        },
        sorted(vars(model)),
    )


IDS = torch.tensor([[0, 40, 50, 60], [0, 33, 44, 55]])


def logits(model):
    with torch.no_grad():
        return model(IDS).logits


@law(60)
@given(st.lists(st.tuples(st.integers(0, 59), st.sampled_from("rgsxc")), max_size=5))
@example([(8, "r"), (7, "x"), (9, "g")])
@example([(6, "r"), (6, "x")])
def test_no_nesting_leaves_anything_behind(program):
    """Each step attaches an intervention and runs, generates, captures or fails under it."""
    lm = model_of("llama")
    before = everything(lm.model)
    weights = {name: value.clone() for name, value in lm.model.state_dict().items()}
    clean = logits(lm.model)

    def within(steps):
        if not steps:
            return
        (number, action), *rest = steps
        with compose(intervention_of(number)).apply(lm.model):
            if action == "g":
                lm.model.generate(IDS, max_new_tokens=2, do_sample=False, pad_token_id=PADDING)
            elif action == "c":
                capture(lm, IDS.tolist(), progress=False)
            elif action == "x":
                raise Oops
            else:
                logits(lm.model)
            within(rest)

    with suppress(Oops, LirefsError):
        within(program)
    assert everything(lm.model) == before
    assert all(torch.equal(value, weights[name]) for name, value in lm.model.state_dict().items())
    assert torch.equal(logits(lm.model), clean)


@law(60)
@given(st.lists(st.integers(0, 7), min_size=1, max_size=5), st.data())
def test_handles_can_be_removed_in_any_order(numbers, data):
    lm = model_of("llama")
    # Drawn first, as a draw may end the case, which would leave what is attached in place.
    order = data.draw(st.permutations(range(len(numbers))), "order")
    before, clean = everything(lm.model), logits(lm.model)
    handles = [intervention_of(number).attach(lm.model) for number in numbers]
    waiting = [handles[index] for index in order]
    for _ in range(len(waiting) ** 2):  # edits must be removed in order; those refused try again
        handle = waiting.pop(0)
        try:
            handle.remove()
        except EditOrderError:
            waiting.append(handle)
        if not waiting:
            break
    assert everything(lm.model) == before
    assert torch.equal(logits(lm.model), clean)
    for handle in handles:
        handle.remove()
    assert everything(lm.model) == before


def test_a_composition_that_was_removed_halfway_can_be_removed_later():
    """Its edit lies under a later one, so the first removal is refused; a second must work."""
    lm = model_of("llama")
    before = everything(lm.model)
    lower, upper = intervention_of(7).attach(lm.model), Scaled(0.5).attach(lm.model)
    with pytest.raises(EditOrderError):
        lower.remove()
    upper.remove()
    lower.remove()
    assert everything(lm.model) == before


@law(40)
@given(st.lists(st.integers(0, 5), min_size=2, max_size=4), st.data())
def test_remaining_interventions_work_as_if_the_others_had_never_been_attached(numbers, data):
    lm = model_of("llama")
    chosen = [intervention_of(number) for number in numbers]
    kept = data.draw(st.sets(st.sampled_from(range(len(chosen)))), "kept")
    handles = [one.attach(lm.model) for one in chosen]
    for index, handle in enumerate(handles):
        if index not in kept:
            handle.remove()
    found = logits(lm.model)
    for handle in handles:
        handle.remove()
    with compose(*(one for index, one in enumerate(chosen) if index in kept)).apply(lm.model):
        assert torch.equal(logits(lm.model), found)
