"""One answer to "is this the same model": what changes it, and what does not."""

import copy
import dataclasses
import hashlib
import json
import random

import peft
import pytest
import torch
from states import KINDS, TOKENIZER, added_to, direction, set_to, steerings, with_adapters
from tiny import FAMILIES, fresh_model, tiny_model
from transformers.integrations.bitnet import BitLinear

import kfac
import lirefs
from lirefs import Directions, Steer, capture, compare, wrap
from lirefs.errors import ProvenanceError
from lirefs.model.identity import _essential, identity
from lirefs.tasks import Perplexity

PROMPTS = ["Math: 31 + 27 =", "the baker"]
TASKS = [Perplexity("texts", [("0", PROMPTS[0]), ("1", PROMPTS[1])])]


def both(lm):
    return lm.fingerprint, lm.identity


@pytest.mark.parametrize("family", FAMILIES)
def test_fingerprints_of_ordinary_models_are_those_of_older_versions(family):
    model = tiny_model(family)
    settings = json.dumps(_essential(model.config.to_dict()), sort_keys=True, default=str)
    digest = hashlib.sha256(settings.encode())
    for name, weight in model.named_parameters():
        digest.update(f"{name} {tuple(weight.shape)} {weight.dtype}".encode())
        digest.update(weight.detach().contiguous().view(-1).view(torch.uint8).numpy().data)
    assert wrap(model, TOKENIZER).fingerprint == digest.hexdigest()


@pytest.mark.parametrize("kind", KINDS)
def test_each_state_has_an_identity_of_its_own_and_comes_back(kind):
    make, states_of = KINDS[kind]
    lm = make()
    found = {}
    for name, state in states_of(lm).items():
        with state():
            found[name] = lm.identity
            assert lm.identity == found[name]
        if name != "merged":
            assert lm.identity == found["as it is"], name
    assert len(set(found.values())) == len(found)


@pytest.mark.parametrize("kind", KINDS)
def test_every_parameter_and_buffer_counts(kind):
    lm = KINDS[kind][0]()
    before = both(lm)
    for name, parameter in lm.model.named_parameters():
        with added_to(parameter.view(-1)[-1:], 1.0):
            assert not set(both(lm)) & set(before), name
    saved = set(lm.model.state_dict())
    for name, buffer in lm.model.named_buffers():
        with added_to(buffer.view(-1)[-1:], 1.0):
            assert lm.identity != before[1], name
            assert (lm.fingerprint != before[0]) == (name in saved), name
    assert both(lm) == before


def used(lm, tmp_path):
    capture(lm, PROMPTS, progress=False)
    lm.generate(PROMPTS, max_new_tokens=3)
    with torch.no_grad():
        lm.model(torch.tensor([[5, 6, 7]]), output_hidden_states=True)
    return lm


def steered_and_edited_before(lm, tmp_path):
    layers = [kfac.find_targets(lm.model, layers=[1])[0].name]
    with (Steer(direction(), "add") + kfac.SVDEdit(layers, 0.5)).apply(lm.model):
        lm.generate(PROMPTS, max_new_tokens=3)
    return lm


def moved_and_back(lm, tmp_path):
    lm.model.double().float().to("cpu")
    return lm


def trained_mode(lm, tmp_path):
    lm.model.train()
    training = both(lm)
    lm.model.eval()
    assert training == both(lm)
    lm.model.requires_grad_(False)
    return lm


def copied(lm, tmp_path):
    return wrap(copy.deepcopy(lm.model), TOKENIZER)


def reloaded(lm, tmp_path):
    lm.model.save_pretrained(tmp_path)
    base = lm.model
    if isinstance(base, peft.PeftModel):
        loaded = peft.PeftModel.from_pretrained(fresh_model("llama"), tmp_path / "one", "one")
        loaded.load_adapter(tmp_path / "two", "two")
        return wrap(loaded.eval(), TOKENIZER)
    return wrap(type(base).from_pretrained(tmp_path, dtype="float32"), TOKENIZER)


SAME = [used, steered_and_edited_before, moved_and_back, trained_mode, copied, reloaded]


@pytest.mark.parametrize("same", SAME)
@pytest.mark.parametrize("kind", ["plain", "adapters", "experts"])
def test_what_changes_nothing_leaves_it_the_same(kind, same, tmp_path):
    lm = KINDS[kind][0]()
    before = both(lm)
    assert both(same(lm, tmp_path)) == before


@pytest.mark.parametrize(
    "config",
    [
        peft.LoraConfig(r=4, use_dora=True, target_modules=["q_proj"], init_lora_weights=False),
        peft.LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["lm_head"]),
        peft.IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]),
        peft.LoHaConfig(r=2, target_modules=["q_proj"], init_weights=False),
        peft.VeraConfig(r=4, target_modules=["q_proj"]),
        peft.LNTuningConfig(task_type="CAUSAL_LM"),
        peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
    ],
    ids=lambda config: type(config).__name__,
)
def test_every_kind_of_adapter_can_be_told_from_its_absence(config):
    lm = wrap(peft.get_peft_model(fresh_model("llama"), config).eval(), TOKENIZER)
    on = both(lm)
    lm.generate("abc", max_new_tokens=2)
    assert both(lm) == on
    with lm.model.disable_adapter():
        assert not set(both(lm)) & set(on)
    assert both(lm) == on


@pytest.mark.parametrize("kind", KINDS)
def test_one_cache_never_gives_the_states_of_another(kind, tmp_path):
    make, states_of = KINDS[kind]
    lm, seen = make(), {}
    settings = {"sites": ["resid_post"], "progress": False}
    states = states_of(lm)
    for name, state in states.items():
        with state():
            seen[name] = capture(lm, PROMPTS, **settings).values
    order = [*states] * 2
    random.Random(0).shuffle(order)
    for name in order:
        with states[name]():
            values = capture(lm, PROMPTS, cache=tmp_path, **settings).values
        torch.testing.assert_close(values, seen[name], atol=1e-5, rtol=1e-5)
    assert len(list(tmp_path.iterdir())) >= len(states)  # more where merging has rounded


@pytest.mark.parametrize("kind", KINDS)
def test_one_journal_never_gives_the_numbers_of_another(kind, tmp_path):
    make, states_of = KINDS[kind]
    lm = make()

    def score(**settings):
        found = compare(lm, {}, TASKS, resamples=1, progress=False, **settings)
        return found.score("unchanged", "texts")

    states = states_of(lm)
    seen = {}
    for name, state in states.items():
        with state():
            seen[name] = score()
    for name in reversed([*states] * 2):
        with states[name]():
            assert score(journal=tmp_path) == pytest.approx(seen[name], rel=1e-5), name


@pytest.mark.parametrize(
    "change",
    [
        lambda lm: lm.model.set_attn_implementation("eager"),
        lambda lm: setattr(lm.model.generation_config, "eos_token_id", [1, 5]),
        lambda lm: setattr(lm, "layout", dataclasses.replace(lm.layout, mlp="mlp.act_fn")),
    ],
    ids=["attention", "end tokens", "layout"],
)
def test_what_decides_only_the_numbers_of_now_is_in_the_identity_alone(change):
    lm = KINDS["plain"][0]()
    before = both(lm)
    change(lm)
    assert lm.fingerprint == before[0]
    assert lm.identity != before[1]


def test_autocast_counts_while_it_is_on():
    lm = KINDS["plain"][0]()
    before = both(lm)
    with torch.autocast("cpu", torch.bfloat16):
        assert lm.identity != before[1]
        assert lm.fingerprint == before[0]
    assert both(lm) == before


def test_dtype_and_a_changed_configuration_are_other_models():
    lm = KINDS["plain"][0]()
    found = {lm.fingerprint}
    lm.model.bfloat16()
    found.add(lm.fingerprint)
    lm.model.config.rms_norm_eps = 0.5
    found.add(lm.fingerprint)
    assert len(found) == 3


def test_a_direction_steers_its_model_under_any_attention_and_whatever_is_attached():
    lm = KINDS["plain"][0]()
    plain = dataclasses.replace(direction(), model=lm.fingerprint)
    first, second = steerings()["steered"], Steer(direction(5), "ablate")
    with first.apply(lm.model):
        steered = dataclasses.replace(direction(), model=lm.fingerprint)
        with second.apply(lm.model):
            for one in (plain, steered):
                Steer(one, "add").check(lm.model)
    lm.model.set_attn_implementation("eager")
    Steer(plain, "add").check(lm.model)
    with pytest.raises(ProvenanceError):
        Steer(steered, "add").check(lm.model)


def test_a_direction_of_one_adapter_is_not_that_of_another(tmp_path):
    lm = with_adapters()
    made = Directions({(1, "resid_pre"): direction()}, {"model": lm.fingerprint})
    made.save(tmp_path / "file")
    Steer(made, "add").check(lm.model)
    with lm.model.disable_adapter(), pytest.raises(ProvenanceError, match="another model"):
        Steer(made, "add").check(lm.model)
    with Steer(direction(3), "add").apply(lm.model):
        Directions.load(tmp_path / "file", lm)
    lm.model.set_adapter("two")
    with pytest.raises(ProvenanceError):
        Steer(made, "add").check(lm.model)
    with pytest.raises(ProvenanceError):
        Directions.load(tmp_path / "file", lm)


def test_a_steering_on_a_wrapper_is_seen_from_its_inside():
    outer = with_adapters()
    inner = wrap(outer.model.get_base_model(), TOKENIZER)
    before = inner.identity
    found = set()
    for lm in (outer, inner):
        with steerings()["steered"].apply(lm.model):
            found.add(inner.identity)
    assert before not in found
    assert inner.identity == before


def test_hooks_of_a_steering_on_a_copy_are_refused():
    lm = KINDS["plain"][0]()
    with steerings()["steered"].apply(lm.model):
        hooks = lm.model.model.layers[1]._forward_pre_hooks.copy()
    other = KINDS["plain"][0]()
    other.model.model.layers[1]._forward_pre_hooks.update(hooks)
    with pytest.raises(ProvenanceError, match="steering that is attached to another model"):
        _ = other.identity


class Packed(torch.nn.Linear):
    """Saves scales besides its weight, as bitsandbytes does."""

    def __init__(self, scale):
        super().__init__(4, 4, bias=False)
        self.weight.requires_grad_(False).fill_(1)
        self.state = {"scale": torch.full((8000,), scale), "kind": "nf4", "block": 64}

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[prefix + "weight.scale"] = self.state["scale"]
        text = json.dumps({key: self.state[key] for key in ("kind", "block")})
        destination[prefix + "weight.packed"] = torch.tensor([*text.encode()], dtype=torch.uint8)


class Extra(torch.nn.Linear):
    """Has a state of its own kind, as Transformer Engine does."""

    def __init__(self, extra):
        super().__init__(4, 4, bias=False)
        self.weight.requires_grad_(False).fill_(1)
        self.extra = extra

    def get_extra_state(self):
        return self.extra


def bit_linear(scale):
    layer = BitLinear(8, 4, bias=False)
    layer.weight_scale.fill_(scale)
    return layer


def two_parts(scale):
    from torch.testing._internal.two_tensor import TwoTensor

    layer = torch.nn.Linear(4, 4, bias=False)
    parts = torch.ones(4, 4), torch.full((4, 4), scale)
    layer.weight = torch.nn.Parameter(TwoTensor(*parts), requires_grad=False)
    return layer


QUANTIZED = {
    "scales": Packed,
    "extra state": lambda scale: Extra({"amax": scale}),
    "BitLinear": bit_linear,
    "tensor subclass": two_parts,
}


@pytest.mark.parametrize("kind", QUANTIZED)
def test_the_state_of_quantized_weights_counts(kind):
    make = QUANTIZED[kind]
    one, same, other = make(0.5), make(0.5), make(0.25)
    found = [wrap_of(model).fingerprint for model in (one, same, other, one)]
    assert found[0] == found[1] == found[3] != found[2]


def test_packed_settings_count_and_are_hashed_once(monkeypatch):
    layer = Packed(0.5)
    lm = wrap_of(layer)
    before = lm.fingerprint
    monkeypatch.setattr("lirefs.model.identity._State._hash", None)
    assert lm.fingerprint == before
    monkeypatch.undo()
    layer.state["block"] = 32
    changed = lm.fingerprint
    layer.state["scale"][-1] += 1
    assert len({before, changed, lm.fingerprint}) == 3


def wrap_of(module):
    """A stand-in for a model around one module."""
    return lirefs.LanguageModel(torch.nn.Sequential(module), TOKENIZER, None, "one")


def test_what_was_made_in_inference_mode_is_hashed_each_time():
    with torch.inference_mode():
        layer = torch.nn.Linear(4, 4)
    lm = wrap_of(layer)
    before = lm.fingerprint
    with torch.inference_mode():
        layer.weight.add_(1)
    assert lm.fingerprint != before


@pytest.mark.parametrize("setting", ["scalar", "buffer", "tensor", "parameterless module"])
def test_modules_of_others_count_with_what_they_hold(setting):
    class Mine(torch.nn.Module):
        def __init__(self, value):
            super().__init__()
            if setting == "scalar":
                self.amount = value
            elif setting == "buffer":
                self.register_buffer("amount", torch.tensor([value]), persistent=False)
            elif setting == "tensor":
                self.amount = {"of it": torch.tensor([value])}
            else:
                self.inner = torch.nn.ReLU() if value else torch.nn.Tanh()

    found = [identity(torch.nn.Sequential(Mine(value))) for value in (0.0, 1.0, 0.0)]
    assert found[0] == found[2] != found[1]


def test_the_hash_is_kept_in_a_sweep(monkeypatch):
    lm = with_adapters()
    edit = kfac.SVDEdit([kfac.find_targets(lm.model, layers=[1])[0].name], 0.5)
    before = both(lm)
    hashed = []
    original = lirefs.model.identity._State._hash
    monkeypatch.setattr(
        lirefs.model.identity._State, "_hash", lambda self: hashed.append(1) or original(self)
    )
    for steer in steerings().values():
        with steer.apply(lm.model):
            assert not set(both(lm)) & set(before)
    for name in ("two", "one"):
        lm.model.set_adapter(name)
        _ = lm.identity
    assert not hashed
    with edit.apply(lm.model):
        Steer(dataclasses.replace(direction(), model=before[0]), "add").check(lm.model)
    assert len(hashed) == 1
    assert both(lm) == before


def test_a_swapped_setting_is_seen_with_the_same_weights():
    lm = KINDS["plain"][0]()
    with set_to(lm.model.config, "rms_norm_eps", 3.0):
        other = lm.fingerprint
    assert lm.fingerprint != other
