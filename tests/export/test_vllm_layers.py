"""Operators on layers as vLLM builds them, without vLLM: sums of pairs, packed batches."""

import math
import os
import sys
import types
import zipfile
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from steering_tools import direction
from torch import nn

from lirefs import Perplexity, ShortAnswer, Steer, compare
from lirefs.errors import BackendError, LirefsError, TaskError
from lirefs.export import vllm, vllm_layers
from lirefs.export.vllm_layers import FAMILIES, pass_tokens, place_operators
from lirefs.steering import OPERATORS, Gate, Schedule
from lirefs.steering import scope as scopes
from lirefs.tasks import ndcg_task

WIDTH = 32


class PairLayer(nn.Module):
    """Returns a pair whose sum is the stream, as most families of vLLM do."""

    def __init__(self):
        super().__init__()
        self.self_attn, self.mlp = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, positions, hidden_states, residual):
        stream = hidden_states if residual is None else hidden_states + residual
        stream = stream + self.self_attn(stream)
        return self.mlp(stream), stream


class OneLayer(PairLayer):
    """Returns the stream."""

    def forward(self, positions, hidden_states):
        hidden_states = hidden_states + self.self_attn(hidden_states)
        return hidden_states + self.mlp(hidden_states)


class Decoder(nn.Module):
    def __init__(self, layer, n=3):
        super().__init__()
        self.layers = nn.ModuleList(layer() for _ in range(n))

    def forward(self, positions, hidden_states):
        pair = isinstance(self.layers[0], PairLayer) and type(self.layers[0]) is not OneLayer
        state = (hidden_states, None) if pair else (hidden_states,)
        for layer in self.layers:
            out = layer(positions, *state)
            state = out if pair else (out,)
        return state[0] + state[1] if pair else state[0]


@pytest.fixture(params=[PairLayer, OneLayer])
def decoder(request, monkeypatch):
    for kind in (PairLayer, OneLayer):
        name = f"{kind.__module__.rpartition('.')[2]}.{kind.__name__}"
        monkeypatch.setitem(FAMILIES, name, ("self_attn", "mlp"))
    torch.manual_seed(0)
    return Decoder(request.param).double()


def config(**changes):
    """The parts of a `vllm_config` that are read."""
    given = {"eager": True, "worker": vllm.WORKER, "prefixes": False, "second": False} | changes
    return types.SimpleNamespace(
        model_config=types.SimpleNamespace(
            enforce_eager=given["eager"],
            get_total_num_hidden_layers=lambda: 3,
            get_hidden_size=lambda: WIDTH,
        ),
        parallel_config=types.SimpleNamespace(worker_cls=given["worker"]),
        cache_config=types.SimpleNamespace(enable_prefix_caching=given["prefixes"]),
        use_v2_model_runner=given["second"],
    )


# Three requests: the beginning of a prompt, a generated token, the end of a prompt; then padding.
POSITIONS = torch.tensor([0, 1, 2, 3, 7, 8, 0])
BATCH = np.array([5, 3, 9]), np.array([3, 4, 6])
TOUCHED = {
    "all": [1, 1, 1, 1, 1, 1, 1],
    "prompt": [1, 1, 1, 0, 1, 1, 0],
    "generated": [0, 0, 0, 1, 0, 0, 0],
    "last_prompt_token": [0, 0, 0, 0, 0, 1, 0],
}


def by_hand(decoder, steer, x, touched):
    """The same by operators between the modules."""
    layout = types.SimpleNamespace(n_layers=3)
    operators = {(layer, site): one for layer, site, one in steer.operators(layout)}

    def at(layer, site, h):
        one = operators.get((layer, site))
        return h if one is None else torch.where(touched[:, None], one(h), h)

    for index, layer in enumerate(decoder.layers):
        x = at(index, "resid_pre", x)
        x = x + at(index, "attn_out", layer.self_attn(x))
        x = at(index, "resid_post", x + at(index, "mlp_out", layer.mlp(x)))
    return x


def hooks_on(model):
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


@pytest.mark.parametrize("site", ["resid_pre", "attn_out", "mlp_out", "resid_post"])
@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize("scope", TOUCHED)
def test_the_stream_gets_the_operator(decoder, operator, site, scope):
    steer = Steer(direction(site=site), operator, layers=[0, 2], scope=scope)
    x = torch.randn(7, WIDTH, dtype=torch.float64)
    plain = decoder(POSITIONS, x)
    expected = by_hand(decoder, steer, x, torch.tensor(TOUCHED[scope]).bool())
    hooks = place_operators(decoder, vllm.plan_of(steer, config()), lambda: BATCH)
    found = decoder(POSITIONS, x)
    for hook in hooks:
        hook.remove()
    torch.testing.assert_close(found, expected)
    assert not torch.equal(found, plain)
    assert torch.equal(decoder(POSITIONS, x), plain)
    assert hooks_on(decoder) == 0


def test_tokens_outside_the_scope_keep_every_bit(decoder):
    steer = Steer(direction(), "add", scope="generated")
    x = torch.randn(7, WIDTH, dtype=torch.float64)
    plain = decoder(POSITIONS, x)
    place_operators(decoder, vllm.plan_of(steer, config()), lambda: BATCH)
    changed = (decoder(POSITIONS, x) != plain).any(dim=1)
    assert changed.int().tolist() == TOUCHED["generated"]


def test_first_generated_and_from_position():
    tokens = pass_tokens(torch.tensor([2, 3, 4, 5, 0]), np.array([3]), np.array([4]))
    assert scopes.first_generated(2).touches(tokens).int().tolist() == [0, 1, 1, 0, 0]
    assert scopes.from_position(4).touches(tokens).int().tolist() == [0, 0, 1, 1, 0]


def test_no_request_at_all():
    tokens = pass_tokens(torch.zeros(3, dtype=torch.long), np.zeros(0), np.zeros(0))
    assert not scopes.prompt().touches(tokens).any()


def test_layers_of_other_processes_are_left_out(decoder):
    class PPMissingLayer(nn.Identity):
        pass

    steer = Steer(direction(), "add", layers=[0, 2])
    decoder.layers[0] = PPMissingLayer()
    assert len(place_operators(decoder, vllm.plan_of(steer, config()), lambda: BATCH)) == 1


def test_an_unknown_family():
    plan = vllm.plan_of(Steer(direction(), "add"), config())
    with pytest.raises(BackendError, match=r"test_vllm_layers.PairLayer\) were not compared"):
        place_operators(Decoder(PairLayer), plan, lambda: BATCH)


@pytest.mark.parametrize("fault", ["layer", "site"])
def test_nothing_is_left_where_one_place_fails(decoder, monkeypatch, fault):
    plan = vllm.plan_of(Steer(direction(), "add", layers=[0, 1, 2], scope="prompt"), config())
    if fault == "site":
        plan["places"][2]["site"] = "mlp_out"
        monkeypatch.setitem(FAMILIES, vllm_layers.family(decoder.layers[0]), ("self_attn", ""))
    else:
        plan["places"][2]["layer"] = 7
    with pytest.raises(BackendError, match=r"no module that gives mlp_out|layer 7 does not exist"):
        place_operators(decoder, plan, lambda: BATCH)
    assert hooks_on(decoder) == 0


REFUSED = {
    "compiles": (Steer(direction(), "add"), {"eager": False}, "enforce_eager=True"),
    "worker": (Steer(direction(), "add"), {"worker": "auto"}, "vllm_worker.Worker"),
    "gate": (
        Steer(direction(), "add", gate=Gate(direction(0), 1.0)),
        {},
        "a gate decides",
    ),
    "rows": (Steer(direction(), "add", [1.0, 2.0]), {}, "differs by row or token"),
    "schedule": (Steer(direction(), "add", Schedule([1.0])), {}, "differs by row or token"),
    "prefixes": (
        Steer(direction(), "add", scope="prompt"),
        {"prefixes": True},
        "enable_prefix_caching=False",
    ),
    "runner": (
        Steer(direction(), "add", scope="prompt"),
        {"second": True},
        "VLLM_USE_V2_MODEL_RUNNER=0",
    ),
    "mask": (Steer(direction(), "add", scope=scopes.mask([True])), {}, "made for certain texts"),
    "own": (
        Steer(direction(), "add", scope=scopes.Scope("mine", lambda tokens: tokens.age > 2)),
        {},
        "made for certain texts",
    ),
    "own with settings": (
        Steer(direction(), "add", scope=scopes.Scope("first_generated", any, {"n": 2})),
        {},
        "by a function of your own",
    ),
    "own name": (
        Steer(direction(), "add", scope=scopes.Scope("prompt", lambda t: t.age > 2)),
        {},
        "made for certain texts",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_an_engine_cannot_carry_is_refused_by_name(case):
    steer, changes, message = REFUSED[case]
    with pytest.raises(BackendError, match=message):
        vllm.must_carry(config(**changes), [steer])


def test_prefixes_are_no_obstacle_where_positions_decide():
    for scope in ("all", scopes.from_position(3)):
        vllm.must_carry(config(prefixes=True), [Steer(direction(), "add", scope=scope)])


@pytest.mark.parametrize(
    ("steer", "message"),
    [
        (Steer(direction(width=16), "add"), "width"),
        (Steer(direction(5), "add"), "layer 5 does not exist"),
        (Steer(direction(), "add", {0: 1.0}), "no strength for layer 1"),
        (Steer(direction(), "add", sites=["nowhere"]), "site must be one of"),
    ],
)
def test_a_direction_of_another_model(steer, message):
    with pytest.raises(LirefsError, match=message):
        vllm.plan_of(steer, config())


def test_other_interventions(lm):
    class Edit:
        def attach(self, model):
            raise AssertionError

        def describe(self):
            return {}

    with pytest.raises(BackendError, match="Edit cannot act on vLLM"):
        vllm.steerings_of(Edit())


@pytest.mark.parametrize(
    ("module", "message"),
    [
        (None, "vLLM cannot be imported"),
        (types.SimpleNamespace(__version__="0.9.1"), "vLLM 0.9.1 is too old; install 0.32"),
        (types.SimpleNamespace(__version__="dev"), "vLLM dev is too old"),
        (types.SimpleNamespace(__version__="0.33.0", LLM=dict), "llm must be a vllm.LLM, got str"),
    ],
)
def test_no_engine(monkeypatch, module, message):
    monkeypatch.setitem(sys.modules, "vllm", module)
    with (
        pytest.raises(BackendError, match=message),
        vllm.steered("folder", Steer(direction(), "add")),
    ):
        raise AssertionError


STEER = Steer(direction(), "add")


class FakeEngine:
    """As much of a `vllm.LLM` as `steered` uses, with two workers, of which one may refuse."""

    def __init__(self, answers=("", ""), busy=False, **changes):
        self.calls, self.answers = [], list(answers)
        running = types.SimpleNamespace(
            vllm_config=config(**changes), has_unfinished_requests=lambda: busy
        )
        self.llm_engine = running

    def collective_rpc(self, method, args=()):
        self.calls.append(method)
        return self.answers if method == "lirefs_steer" else [None, None]

    def reset_prefix_cache(self):
        self.calls.append("reset")
        return True


@pytest.fixture
def _fake_vllm(monkeypatch):
    fake = types.SimpleNamespace(__version__="0.32.0", LLM=FakeEngine)
    monkeypatch.setitem(sys.modules, "vllm", fake)


@pytest.mark.usefixtures("_fake_vllm")
def test_cached_prefixes_are_dropped_on_entry_and_exit():
    llm = FakeEngine(prefixes=True)
    with vllm.steered(llm, Steer(direction(), "add")):
        assert llm.calls == ["reset", "lirefs_steer"]
    assert llm.calls[2:] == ["lirefs_release", "reset"]


@pytest.mark.usefixtures("_fake_vllm")
@pytest.mark.parametrize("answers", [("", "layer 9 is odd"), ("layer 9 is odd", "")])
def test_where_one_worker_refuses_all_release(answers):
    llm = FakeEngine(answers)
    with pytest.raises(BackendError, match="layer 9 is odd"), vllm.steered(llm, STEER):
        raise AssertionError
    assert llm.calls == ["reset", "lirefs_steer", "lirefs_release", "reset"]


@pytest.mark.usefixtures("_fake_vllm")
def test_a_busy_engine():
    llm = FakeEngine(busy=True)
    with pytest.raises(BackendError, match="still runs requests"), vllm.steered(llm, STEER):
        raise AssertionError
    assert llm.calls == []


def test_vllm_lens_takes_it(lm):
    steer = Steer(direction(2), "add", {1: 2.0, 2: 3.0}, layers=[1, 2], sites=["resid_pre"])
    given = vllm.to_vllm_lens(steer, lm)
    assert given["layer_indices"] == [0, 1]
    vector = direction(2).vector
    torch.testing.assert_close(given["activations"], torch.stack([2 * vector, 3 * vector]))


@pytest.mark.parametrize(
    ("steer", "message"),
    [
        (Steer(direction(0), "add"), "cannot add at layer 0, resid_pre"),
        (Steer(direction(), "ablate"), "cannot ablate at layer 1, resid_pre"),
        (Steer(direction(site="attn_out"), "add"), "cannot add at layer 1, attn_out"),
        (Steer(direction(), "add", 0.0), "nothing to write"),
        (Steer(direction(), "add", scope="prompt"), "the scope is 'prompt'"),
    ],
)
def test_what_vllm_lens_cannot_do(lm, steer, message):
    with pytest.raises(BackendError, match=message):
        vllm.to_vllm_lens(steer, lm)


def test_the_types_of_vllm_lens_take_it(lm, tmp_path, monkeypatch):
    wheel = os.environ.get("VLLM_LENS_WHEEL", "")
    if not wheel:
        pytest.skip("needs the wheel of vllm-lens: name it in VLLM_LENS_WHEEL (.ci/vllm does)")
    zipfile.ZipFile(wheel).extractall(tmp_path)  # a folder in it cannot be imported from the file
    monkeypatch.syspath_prepend(tmp_path)
    lens = pytest.importorskip("vllm_lens")
    given = vllm.to_vllm_lens(Steer(direction(site="resid_post"), "add", 2.0), lm)
    vector = lens.SteeringVector(**given)
    again = lens.SteeringVector.model_validate(vector.model_dump())
    assert again.layer_index_map == {1: 0}
    assert (again.scale, again.norm_match) == (1.0, False)
    torch.testing.assert_close(again.activations[0], 2 * direction().vector)


class CannedEngine:
    """An engine that answers every prompt with the same tokens."""

    def __init__(self, row):
        self.row, self.under, self.seen = row, [], []

    def check(self, lm):
        pass

    def describe(self):
        return {"runtime": "canned"}

    @contextmanager
    def steered(self, intervention):
        self.under.append(intervention)
        yield self

    def greedy(self, prompts, max_new_tokens, ends, until):
        self.seen.append((max_new_tokens, sorted(ends), list(until)))
        return [list(self.row) for _ in prompts]


def test_a_comparison_generates_on_the_engine(lm):
    word, end = lm.encode(["x"], add_special_tokens=False)[0][0], lm.tokenizer.eos_token_id
    engine, steer = CannedEngine([word, end, word]), Steer(direction(), "add")
    task = ShortAnswer("letters", [("1", "say x", "x"), ("2", "say y", "y")])
    found = compare(lm, {"steered": steer}, [task], progress=False, engine=engine)
    assert found.cell("steered", "letters").value.value == 0.5
    assert engine.under == [steer, steer]  # tried first
    assert engine.seen == [(8, [end], [])] * 2
    assert found.provenance["engine"] == {"runtime": "canned"}
    own = compare(lm, {"steered": steer}, [task], progress=False)
    assert "engine" not in own.provenance
    assert own.provenance["tasks"] != found.provenance["tasks"]


def test_likelihoods_are_not_scored_on_an_engine(lm):
    task = Perplexity("texts", ["some text", "another text"])
    first, engine = ShortAnswer("letters", [("1", "say x", "x")]), CannedEngine([1])
    for refused in (task, ndcg_task(lm, [("1", "some text")], name="ranks")):
        with pytest.raises(TaskError, match=f"{refused.name}: .*compare others without engine"):
            compare(lm, {"steered": Steer(direction(), "add")}, [first, refused], engine=engine)
    assert engine.seen == engine.under == []  # before anything runs

    class Pretended(Perplexity):
        generates = True

    with pytest.raises(TaskError, match="compare others without engine"):
        compare(lm, {}, [Pretended("texts", task.items)], progress=False, engine=engine)
    found = compare(lm, {}, [task], progress=False)
    assert math.isfinite(found.cell("unchanged", "texts").value.value)
