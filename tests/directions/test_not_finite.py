"""NaN and infinity are met by name: which layer, site, prompt and position, and what to do."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from steering_tools import split
from tiny import fresh_model, tiny_tokenizer

from lirefs import Direction, Directions, Gate, Steer, capture, fit, fit_directions, wrap
from lirefs.directions.capture import Activations, stream_states
from lirefs.errors import CaptureError, InterventionError, NonFiniteError, SettingError

PROMPTS = ["0123", "a longer one", "7 and #", "8"]
MARK = "#"


@pytest.fixture
def one_token_breaks():
    """A model whose MLP of layer 1 answers one token with NaN."""
    lm = wrap(fresh_model("llama"), tiny_tokenizer())
    mark = lm.encode([MARK])[0][-1]
    seen = []

    def see(module, args, kwargs):
        seen.append((kwargs["input_ids"] == mark).unsqueeze(-1))

    def break_it(module, args, output):
        return output.masked_fill(seen[-1], torch.nan)

    for hook in (see, break_it):  # those of unknown effect would be refused with a cache
        hook.__module__ = "torch"
    lm.model.model.register_forward_pre_hook(see, with_kwargs=True)
    lm.model.model.layers[1].mlp.register_forward_hook(break_it)
    return lm


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("budget", [1, 2048])
def test_capture_says_where(one_token_breaks, side, budget):
    settings = {"padding_side": side, "batch_tokens": budget, "progress": False}
    with pytest.raises(NonFiniteError) as found:
        capture(one_token_breaks, PROMPTS, positions=[1, -1], **settings)
    message = str(found.value)
    assert "prompt 2, layer 2, resid_pre, position -1: NaN" in message
    assert "begins in layer 1 at token 7 of 8" in message
    assert "wider dtype" in message
    assert isinstance(found.value, CaptureError)
    sites = ["attn_out", "mlp_out", "resid_post"]
    with pytest.raises(NonFiniteError, match=r"prompt 2, layer 1, mlp_out, position -1: NaN"):
        capture(one_token_breaks, PROMPTS, sites=sites, **settings)
    # Masked attention carries it to earlier tokens too (0 times NaN): where it begins still holds.
    with pytest.raises(
        NonFiniteError, match=r"position 0: NaN, which begins in layer 1 at token 7"
    ):
        capture(one_token_breaks, PROMPTS, positions=[0], **settings)
    capture(one_token_breaks, PROMPTS, layers=[0, 1], **settings)


def test_a_stream_says_where(one_token_breaks):
    with pytest.raises(NonFiniteError, match=r"prompt 2, layer 2, resid_pre, position -1: NaN"):
        list(stream_states(one_token_breaks, PROMPTS, batch_tokens=1, progress=False))


def test_nothing_that_is_not_finite_is_cached(one_token_breaks, tmp_path):
    with pytest.raises(NonFiniteError):
        capture(one_token_breaks, PROMPTS, cache=tmp_path, progress=False)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("dtype", "factor"), [(torch.float16, 1e4), (torch.bfloat16, 1e25)])
def test_overflow_of_half_precision(dtype, factor):
    model = fresh_model("llama").to(dtype)
    with torch.no_grad():
        model.model.layers[2].mlp.up_proj.weight *= factor
        model.model.layers[2].mlp.down_proj.weight *= factor
    lm = wrap(model, tiny_tokenizer(), layout={"blocks": "model.layers"})
    capture(lm, PROMPTS, layers=[0, 1, 2], progress=False)
    with pytest.raises(NonFiniteError, match=r"layer 3, .*: inf, which begins in layer 2"):
        capture(lm, PROMPTS, progress=False)
    if dtype == torch.float16:  # what the message says helps
        capture(wrap(model.float(), tiny_tokenizer()), PROMPTS, progress=False)


@pytest.mark.parametrize("side", ["train", "validation", "test"])
@pytest.mark.parametrize("cached", [False, True])
def test_fit_names_the_question(one_token_breaks, side, cached, tmp_path):
    sides = split().sides
    items = list(sides[side])
    items[3] = dataclasses.replace(items[3], text=items[3].text + MARK)
    broken = dataclasses.replace(split(), **{side: type(sides[side])(items)})
    more = {"cache": tmp_path} if cached else {}
    with pytest.raises(NonFiniteError, match=rf"question '{items[3].id}'\), .* begins in layer 1"):
        fit(one_token_breaks, broken, shuffles=2, progress=False, **more)


def test_fitting_states_from_elsewhere():
    values = torch.randn(4, 2, 1, 8)
    values[3, 1, 0, 5] = -torch.inf
    states = Activations(values, ((0, "resid_pre"), (5, "attn_out")), (-1,))
    with pytest.raises(NonFiniteError, match=r"prompt 3, layer 5, attn_out, position -1: inf"):
        fit_directions(states, [0, 1, 0, 1])


class Lost(LogisticRegression):
    """Does not converge to anything."""

    def fit(self, X, y):
        super().fit(X, y)
        self.coef_ = np.full_like(self.coef_, np.nan)
        return self


def test_an_estimator_that_gives_no_finite_direction():
    states = Activations(torch.randn(4, 1, 1, 8), ((2, "resid_post"),), (-1,))
    with pytest.raises(SettingError, match=r"Lost gave .* not finite at layer 2, resid_post"):
        fit_directions(states, [0, 1, 0, 1], Lost())
    lm = wrap(fresh_model("llama"), tiny_tokenizer())
    with pytest.raises(SettingError, match=r"Lost gave .* not finite at layer 0, resid_pre"):
        fit(lm, split(), Lost(), shuffles=1, progress=False)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_steering_is_refused_when_it_is_made(value):
    vector = torch.ones(32)
    vector[7] = value
    one, fine = Direction(vector, 1, "attn_out"), Direction(torch.ones(32), 0)
    for make in (
        lambda: Steer(one, "add"),
        lambda: Steer(Directions({(1, "attn_out"): one, (0, "resid_pre"): fine}), "ablate"),
        lambda: Steer(one, "clamp"),
        lambda: Gate(one, 0.5),
    ):
        with pytest.raises(InterventionError, match=r"layer 1, attn_out has .* NaN or infinite"):
            make()
    for make in (
        lambda: Steer(fine, "add", value),
        lambda: Steer(fine, "add", {0: value}),
        lambda: Steer(fine, "add", [1.0, value]),
        lambda: Steer(fine, "add", torch.tensor(value)),
        lambda: Gate(fine, value),
        lambda: Gate(dataclasses.replace(fine, means=(0.0, value), counts=(1, 1))),
    ):
        with pytest.raises(InterventionError, match=r"finite"):
            make()


def test_a_steered_pass_asks_nothing(monkeypatch):
    """Whether values are finite is asked when a steering is made: later it would cost time."""
    lm = wrap(fresh_model("llama"), tiny_tokenizer())
    ids = torch.tensor(lm.encode(PROMPTS[:1]))
    steerings = [
        Steer(Direction(torch.ones(32), 1), operator, layers="all")
        for operator in ("add", "ablate", "norm_preserving_add")
    ]
    asked = []

    def count(owner, name):
        original = getattr(owner, name)
        monkeypatch.setattr(
            owner, name, lambda *given, **more: (asked.append(name), original(*given, **more))[1]
        )

    for name in ("isfinite", "isnan", "isinf", "item", "tolist", "__bool__", "__int__", "cpu"):
        count(torch.Tensor, name)
    count(torch, "isfinite")

    def questions():
        asked.clear()
        with torch.no_grad():
            lm.model(ids)
        return list(asked)

    unsteered = questions()
    for one in steerings:
        with one.apply(lm.model):
            questions()  # operators are made ready at their first tensor
            assert questions() == unsteered
