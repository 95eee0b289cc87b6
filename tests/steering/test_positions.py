"""Positions in every dialect: packed rows, three axes, ids of the caller's own."""

import pytest
import torch
from steering_tools import touched
from tiny import fresh_model, tiny_model, tiny_tokenizer
from transformers import ContinuousBatchingConfig, DynamicCache, GenerationConfig

from lirefs import Direction, Gate, Schedule, Steer, wrap
from lirefs.errors import InterventionError, ScopeError
from lirefs.steering import scope as scopes

VECTOR = 3 * torch.randn(32, generator=torch.Generator().manual_seed(5))
IDS = torch.tensor([[0, 40, 50, 60, 70, 80, 90]])
PACKED = torch.tensor([[0, 1, 2, 3, 0, 1, 2]])
PROBE = Direction(VECTOR, 0)
OF_ONE_TEXT = {
    "prompt": {"scope": "prompt"},
    "generated": {"scope": "generated"},
    "last_prompt_token": {"scope": "last_prompt_token"},
    "first_generated": {"scope": scopes.first_generated(2)},
    "mask": {"scope": scopes.mask([True, False, True])},
    "rows": {"strength": [1.0]},
    "schedule": {"strength": Schedule([1.0])},
    "row gate": {"gate": Gate(PROBE, 0.0, per="row")},
}


@pytest.fixture(scope="module")
def lm():
    return wrap(tiny_model("llama"), tiny_tokenizer())


def steering(**settings):
    return Steer(Direction(VECTOR, 1), "add", **{"strength": 1.0, **settings})


@pytest.mark.parametrize("mask", [None, torch.ones_like(IDS)])
@pytest.mark.parametrize("way", OF_ONE_TEXT)
def test_packed_rows_are_refused(lm, way, mask):
    with steering(**OF_ONE_TEXT[way]).apply(lm.model), pytest.raises(ScopeError, match="restart"):
        lm.model(IDS, position_ids=PACKED, attention_mask=mask)


@pytest.mark.parametrize("mask", [None, torch.ones_like(IDS)])
def test_positions_in_packed_rows_are_those_in_their_text(lm, mask):
    steer = steering(scope=scopes.from_position(2))
    with steer.apply(lm.model), touched(lm, 1) as seen:
        lm.model(IDS, position_ids=PACKED, attention_mask=mask)
    assert seen == [[[0, 0, 1, 1, 0, 0, 1]]]
    for gate in (None, Gate(PROBE, -1e3)):
        with steering(gate=gate).apply(lm.model), touched(lm, 1) as seen:
            lm.model(IDS, position_ids=PACKED, attention_mask=mask)
        assert seen == [[[1] * 7]]


def test_padding_does_not_look_packed(lm):
    for side in ("left", "right"):
        batch = lm.pad([[0, 40, 50], [0, 40, 50, 60, 70]], side=side)
        for fill in (0, 1):
            padding = batch["attention_mask"] == 0
            ids = batch["position_ids"].masked_fill(padding, fill)
            with steering(scope="last_prompt_token").apply(lm.model), touched(lm, 1) as seen:
                lm.model(batch["input_ids"], batch["attention_mask"], position_ids=ids)
            short = [0, 0, 0, 0, 1] if side == "left" else [0, 0, 1, 0, 0]
            assert seen == [[short, [0, 0, 0, 0, 1]]]


@pytest.mark.parametrize(
    ("prompt", "step"),
    [
        pytest.param(torch.arange(100, 107)[None], None, id="begins at 100, then none"),
        pytest.param(torch.arange(100, 107)[None], 107, id="begins at 100"),
        pytest.param(torch.arange(7)[None] * 2, None, id="every other position, then none"),
        pytest.param(torch.arange(7)[None], 7, id="as the model counts"),
    ],
)
def test_position_ids_of_the_callers_own_with_a_cache(lm, prompt, step):
    for scope, expected in {"prompt": [[1] * 7], "generated": [[0] * 7]}.items():
        with steering(scope=scope).apply(lm.model), touched(lm, 1) as seen, torch.no_grad():
            cache = DynamicCache(config=lm.model.config)
            lm.model(IDS, position_ids=prompt, past_key_values=cache)
            for i in range(2):
                ids = None if step is None else torch.tensor([[step + i]])
                lm.model(IDS[:, :1], position_ids=ids, past_key_values=cache)
        assert seen == [expected, [[int(scope == "generated")]], [[int(scope == "generated")]]]


def test_a_cropped_cache_is_read_and_not_counted(lm):
    steer = steering(scope=scopes.from_position(5))
    with steer.apply(lm.model), touched(lm, 1) as seen, torch.no_grad():
        cache = DynamicCache(config=lm.model.config)
        lm.model(IDS, past_key_values=cache)
        cache.crop(-3)
        for _ in range(2):
            lm.model(IDS[:, :1], past_key_values=cache)
    assert seen == [[[0, 0, 0, 0, 0, 1, 1]], [[0]], [[1]]]


@pytest.mark.parametrize("given", ["mask", "no mask"])
@pytest.mark.parametrize("axes", ["three", "four", "four, packed"])
def test_position_ids_of_several_axes(lm, axes, given):
    """Qwen2-VL gives three axes of image coordinates, and before them, if at all, the position."""
    owner = lm.model.model
    position = PACKED if "packed" in axes else torch.arange(7)[None]
    ids = torch.stack([position, 0 * position, 0 * position, 0 * position])
    stop = owner.register_forward_pre_hook(
        lambda _, args, kwargs: (args, {**kwargs, "position_ids": position}), with_kwargs=True
    )  # runs after the steering's own, which comes first
    mask = torch.ones_like(IDS) if given == "mask" else None
    with steering(scope=scopes.from_position(2)).apply(lm.model), touched(lm, 1) as found:
        owner(IDS, position_ids=ids[1:] if axes == "three" else ids, attention_mask=mask)
    stop.remove()
    assert found == [[[0, 0, 1, 1, *([0, 0, 1] if "packed" in axes else [1, 1, 1])]]]


def packed_generation(model):
    """Three texts generated by continuous batching, and one by one."""
    prompts = [[0, *range(40, 60)], [0, 33, 44], [0, 99]]
    settings = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 2}
    config = GenerationConfig(**settings, eos_token_id=-1)
    small = ContinuousBatchingConfig(
        num_blocks=16, page_size=16, max_batch_tokens=40, max_requests_per_batch=4
    )
    out = model.generate_batch(
        prompts, generation_config=config, continuous_batching_config=small
    ).values()
    alone = [
        model.generate(torch.tensor([ids]), **settings, eos_token_id=None)[0, len(ids) :].tolist()
        for ids in prompts
    ]
    return [one.generated_tokens for one in out], alone


def test_continuous_batching_is_steered_or_refused():
    model = fresh_model("llama")
    wrap(model, tiny_tokenizer())
    for settings in ({}, {"scope": scopes.from_position(3)}):
        with steering(**settings).apply(model):
            found, alone = packed_generation(model)
        assert found == alone
    assert packed_generation(model)[0] != found
    for settings in OF_ONE_TEXT.values():
        with steering(**settings).apply(model), pytest.raises(ScopeError, match="continuous"):
            packed_generation(model)
    assert "init_continuous_batching" not in vars(model)
    model._cached_continuous_batching_manager = object()
    with pytest.raises(InterventionError, match="persistent manager"):
        steering().attach(model)
    del model._cached_continuous_batching_manager
    assert not model.model._forward_pre_hooks
