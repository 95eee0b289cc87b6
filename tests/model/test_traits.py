import dataclasses
import json

import pytest
import torch
import transformers
from families import build
from tiny import IDS, LAYERS, VOCABULARY, WIDTH, fresh_model, tiny_model, tiny_tokenizer

import kfac
import lirefs
from lirefs.errors import BatchError, SettingError, TaskError
from lirefs.files import cache_dir
from lirefs.model import traits as traits_module
from lirefs.model.traits import Traits, traits_of, window_of
from lirefs.tasks.inference import greedy, score_continuations, token_nlls


@pytest.fixture(autouse=True)
def _nothing_known(monkeypatch):
    monkeypatch.setattr(traits_module, "_BY_CONFIG", {})


def files():
    return list((cache_dir() / "traits").glob("*.json"))


def counted(model, monkeypatch):
    """Make the model count its forward passes."""
    passes = []

    def count(*given):
        passes.append(1)

    count.__module__ = "torch"  # as a hook that is known to change nothing
    model.register_forward_hook(count)
    return passes


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "bloom", "gemma2"])
def test_ordinary_decoders_may_be_run_in_every_way(family):
    found = traits_of(fresh_model(family))
    ways = dataclasses.asdict(found)
    ways.pop("window"), ways.pop("rope")
    assert ways.pop("positions") in (True, None)
    assert all(ways.values())


@pytest.mark.parametrize(
    ("family", "unused"),
    [
        ("bart", ["left", "continued", "shared"]),
        ("recurrent_gemma", ["cache", "continued", "shared"]),
        ("rwkv", ["left", "cache", "continued", "shared"]),
        ("mamba", ["continued", "shared"]),
        ("mpt", ["shared"]),
    ],
)
def test_what_differs_is_not_used(family, unused):
    found = traits_of(build(family))
    assert [name for name in unused if getattr(found, name)] == []


def test_traits_are_printed():
    text = str(lirefs.wrap(build("mpt"), tiny_tokenizer()).traits)
    assert "padding on the left: as alone" in text
    assert "a shared beginning: differs, so it is not used" in text
    assert "attention window: none" in text


@pytest.mark.parametrize(
    ("settings", "window"),
    [
        ({"sliding_window": 16}, 16),
        ({"sliding_window": None}, None),
        ({"sliding_window": 16, "attention_chunk_size": 8}, 8),
        ({"window_size": 5}, 5),
        ({"max_window_layers": 3}, None),
    ],
)
def test_windows_are_read_off_the_configuration(settings, window):
    assert window_of(fresh_model("mistral", **{"sliding_window": None, **settings})) == window


def test_traits_are_kept_for_each_configuration(monkeypatch):
    model = fresh_model("llama")
    passes = counted(model, monkeypatch)
    first = traits_of(model)
    assert 0 < len(passes) <= 8
    assert traits_of(model) == first
    assert len(passes) <= 8
    twin = fresh_model("llama")
    again = counted(twin, monkeypatch)
    assert traits_of(twin) == first
    assert again == []
    # Another process finds them in the cache.
    monkeypatch.setattr(traits_module, "_BY_CONFIG", {})
    third = fresh_model("llama")
    again = counted(third, monkeypatch)
    assert traits_of(third) == first
    assert again == []


@pytest.mark.parametrize("change", ["rope", "attention", "dtype"])
def test_another_configuration_has_traits_of_its_own(change):
    traits_of(fresh_model("llama"))
    other = fresh_model("llama", **({"rope_theta": 5e5} if change == "rope" else {}))
    if change == "attention":
        other.set_attn_implementation("eager")
    if change == "dtype":
        other.double()
    traits_of(other)
    assert len(files()) == 2


def test_another_attention_implementation_of_the_same_model_is_asked_anew():
    model = fresh_model("llama")
    traits_of(model)
    model.set_attn_implementation("eager")
    traits_of(model)
    assert len(files()) == 2


@pytest.mark.parametrize(
    "damage",
    [
        "",
        "{",
        "[]",
        json.dumps({"left": True}),
        json.dumps({**dataclasses.asdict(Traits()), "left": "yes"}),
        json.dumps({**dataclasses.asdict(Traits()), "window": -1}),
    ],
)
def test_a_damaged_file_is_not_believed(damage, monkeypatch):
    right = traits_of(fresh_model("llama"))
    files()[0].write_text(damage)
    monkeypatch.setattr(traits_module, "_BY_CONFIG", {})
    assert traits_of(fresh_model("llama")) == right


def test_a_cache_that_cannot_be_written_is_done_without(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("LIREFS_CACHE", str(tmp_path / "file"))
    assert traits_of(fresh_model("llama")).left


def test_the_model_is_left_as_it_was():
    model = fresh_model("llama").train()
    torch.manual_seed(3)
    state = torch.random.get_rng_state()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    traits_of(model)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(module.training for module in model.modules())
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


@pytest.mark.parametrize("scope", ["all", "generated", "last_prompt_token"])
def test_steering_stands_back_when_a_steered_model_is_asked_first(scope):
    plain = traits_of(fresh_model("gpt2"))
    traits_module._BY_CONFIG.clear()
    for file in files():
        file.unlink()
    model = fresh_model("gpt2")
    steer = lirefs.Steer(lirefs.Direction(torch.full((WIDTH,), 9.0), 1), "add", scope=scope)
    with steer.apply(model):
        assert traits_of(model) == plain


def test_a_lack_of_memory_is_not_taken_for_a_trait(monkeypatch):
    def fail(*given):
        raise torch.OutOfMemoryError("no memory")

    monkeypatch.setattr(traits_module, "_shares", fail)
    with pytest.raises(torch.OutOfMemoryError):
        traits_of(fresh_model("llama"))
    assert files() == []


SHOTS = list(range(40, 60))
SHORT = [*SHOTS, 61, 7, 33]
LONG = [*SHOTS, 90, 11, 52, 76, 101, 14, 23, 64, 88, 35, 71]
OPTIONS = [[30, 31], [32], [33, 34, 35]]


def plain_score(model, prompt, option):
    with torch.no_grad():
        logits = model(torch.tensor([[*prompt, *option]]), use_cache=False).logits[0]
    likely = logits.float().log_softmax(-1)[len(prompt) - 1 : -1]
    return float(likely.gather(1, torch.tensor(option)[:, None]).sum())


@pytest.mark.parametrize(
    "family", ["mistral-window", "gemma3_text", "llama4_text", "mpt", "gpt_neo", "rwkv", "bart"]
)
@pytest.mark.parametrize("company", [[], [LONG], [LONG, SHOTS[:12], LONG[:25]]])
def test_a_score_does_not_depend_on_the_company(family, company):
    lm = lirefs.wrap(build(family), tiny_tokenizer(), layout=layout_of_family(family))
    found = score_continuations(lm, [(prompt, OPTIONS) for prompt in [SHORT, *company]])[0]
    expected = [plain_score(lm.model, SHORT, option) for option in OPTIONS]
    assert [value for value, _ in found] == pytest.approx(expected, abs=2e-5)
    assert greedy(lm, [SHORT, *company], 4)[0] == greedy(lm, [SHORT], 4)[0]
    assert torch.allclose(
        token_nlls(lm, [SHORT, *company])[0], token_nlls(lm, [SHORT])[0], atol=2e-5
    )


def layout_of_family(family):
    return {"blocks": "model.decoder.layers"} if family == "bart" else None


@pytest.mark.parametrize("family", ["bart", "rwkv", "recurrent_gemma"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_states_are_read_without_padding_that_a_model_ignores(family, side):
    lm = lirefs.wrap(build(family), tiny_tokenizer(), layout=layout_of_family(family))
    rows = [SHORT, LONG, LONG[:9]]
    together = lirefs.capture(lm, rows, padding_side=side, progress=False).values
    for index, row in enumerate(rows):
        alone = lirefs.capture(lm, [row], progress=False).values[0]
        assert torch.allclose(together[index], alone, atol=1e-5)


def test_prompts_that_cannot_be_padded_are_generated_in_batches_of_one_length():
    lm = lirefs.wrap(build("bart"), tiny_tokenizer(), layout=layout_of_family("bart"))
    prompts = ["one", "a longer one", "two", "three"]
    alone = [lm.generate(prompt, max_new_tokens=5) for prompt in prompts]
    assert lm.generate(prompts, max_new_tokens=5) == alone
    with pytest.raises(SettingError, match="one by one"):
        lm.generate(prompts, return_dict_in_generate=True)
    assert lm.generate(prompts[::2], return_dict_in_generate=True).sequences.shape[0] == 2


def test_texts_that_cannot_be_padded_are_batched_by_length(monkeypatch):
    lm = lirefs.wrap(tiny_model("llama"), tiny_tokenizer())
    monkeypatch.setattr(traits_module, "traits_of", None)
    known = Traits(right=False, left=False, positions=True)
    monkeypatch.setattr("lirefs.model.language_model.traits_of", lambda model: known)
    texts = ["one", "two", "three", "four", "seven"]
    sizes = [tuple(batch["input_ids"].shape) for batch in lm.batches(texts)]
    assert sizes == [(2, 4), (1, 6), (1, 5), (1, 6)]
    assert all(bool(batch["attention_mask"].all()) for batch in lm.batches(texts))


def test_curvature_refuses_padding_that_a_model_ignores():
    config = transformers.RwkvConfig(
        vocab_size=VOCABULARY, hidden_size=WIDTH, attention_hidden_size=WIDTH,
        num_hidden_layers=LAYERS, **IDS,
    )  # fmt: skip
    lm = lirefs.wrap(transformers.RwkvForCausalLM(config).eval(), tiny_tokenizer())
    targets = kfac.named_targets(lm.model, ["rwkv.blocks.1.feed_forward.value"])
    ids = torch.tensor([SHORT, SHORT])
    mask = torch.ones_like(ids)
    mask[1, :4] = 0
    with pytest.raises(BatchError, match="batch 0 is padded on the left"):
        kfac.collect(
            lm.model, [{"input_ids": ids, "attention_mask": mask}], targets, progress=False
        )
    # On the right, and by texts of different length, nothing is lost.
    whole = kfac.collect(lm, ["one text", "another"], targets, progress=False)
    alone = kfac.collect(lm, ["one text"], targets, progress=False)
    alone = kfac.merge([alone, kfac.collect(lm, ["another"], targets, progress=False)])
    name = targets[0].name
    assert torch.allclose(whole.A(name), alone.A(name), rtol=1e-4, atol=1e-5)


def test_models_whose_tokens_see_later_ones_are_not_scored():
    lm = lirefs.wrap(build("paligemma"), tiny_tokenizer())
    assert not lm.traits.causal
    for score in (
        lambda: score_continuations(lm, [(SHORT, OPTIONS)]),
        lambda: token_nlls(lm, [SHORT]),
        lambda: lirefs.Perplexity("p", [("a", "some text")]).run(lm, lambda n: None),
        lambda: lirefs.MultipleChoice("m", [("a", "x", [" y", " z"], 0)]).run(lm, lambda n: None),
    ):
        with pytest.raises(TaskError, match="tokens see later ones"):
            score()
    assert len(greedy(lm, [SHORT], 3)[0]) == 3
