"""Tokens of a batch by the memory of the device."""

from copy import deepcopy
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from tiny import tiny_model, tiny_tokenizer

from lirefs import wrap
from lirefs.tasks.batches import memory
from lirefs.tasks.batches.memory import tokens_that_fit
from lirefs.tasks.inference import greedy, score_continuations, token_nlls


@pytest.fixture
def lm():
    model = deepcopy(tiny_model("llama"))
    model.config.num_key_value_heads = model.config.num_attention_heads
    return wrap(model, tiny_tokenizer())


def given(monkeypatch, lm, size):
    """Memory in which a batch of so many tokens fits, by the count of a key, a value, 16 states."""
    each = 4 * (2 * lm.n_layers + 16) * lm.width
    monkeypatch.setattr(memory, "total_bytes", lambda device: memory.SHARE * each * size)


def test_a_batch_holds_what_fits(lm, monkeypatch):
    for size, found in [(1000, 1000), (5, 256), (10**6, 8192)]:
        given(monkeypatch, lm, size)
        assert tokens_that_fit(lm) == found
    given(monkeypatch, lm, 10**9)
    assert tokens_that_fit(lm, 1.0) == 1024


def test_logits_and_numbers_of_other_size_count(lm, monkeypatch):
    given(monkeypatch, lm, 800)
    half = wrap(deepcopy(lm.model).to(torch.bfloat16), tiny_tokenizer())
    assert tokens_that_fit(half) == 1600
    lm.model.config.vocab_size = 4 * (2 * lm.n_layers + 16) * lm.width // 12
    assert tokens_that_fit(lm, 1.0) == 400
    assert tokens_that_fit(lm, 0.25) == 640


def test_few_heads_of_keys_take_less(lm, monkeypatch):
    given(monkeypatch, lm, 1000)
    lm.model.config.num_key_value_heads = 1
    share = lm.model.config.num_attention_heads
    each = (2 * lm.n_layers + 16) / (2 * lm.n_layers / share + 16)
    assert tokens_that_fit(lm) == int(1000 * each)
    for odd in ({"num_attention_heads": [1, 2]}, {}):  # one for each layer; a recurrent model
        monkeypatch.setattr(memory, "text_config", lambda model, odd=odd: SimpleNamespace(**odd))
        assert tokens_that_fit(lm) == 1000


def test_weights_in_whole_bytes_say_nothing_of_states(lm, monkeypatch):
    given(monkeypatch, lm, 1000)
    packed = torch.nn.Parameter(torch.zeros(3, dtype=torch.uint8), requires_grad=False)
    parameters = [packed, *lm.model.parameters()]
    monkeypatch.setattr(type(lm.model), "parameters", lambda self: iter(parameters))
    assert tokens_that_fit(lm) == 1000


def test_an_accelerator_gets_larger_batches(lm, monkeypatch):
    monkeypatch.setattr(type(lm), "device", property(lambda self: torch.device("cuda", 1)))
    asked = []

    def properties(device):
        asked.append(device)
        return SimpleNamespace(total_memory=80 * 2**30)

    with mock.patch.object(torch.cuda, "get_device_properties", properties):
        assert tokens_that_fit(lm) == memory.MOST
        assert tokens_that_fit(lm, 1.0) == memory.MOST // 8
    assert asked == [torch.device("cuda", 1)] * 2


def test_a_system_that_says_nothing_is_taken_for_a_small_one(monkeypatch):
    monkeypatch.setattr("os.sysconf_names", {})
    for device in (torch.device("cpu"), torch.device("meta")):
        assert memory.total_bytes(device) == memory.free_bytes(device) == 4 * 2**30


def test_other_accelerators_are_asked_too(monkeypatch):
    monkeypatch.setattr(torch.mps, "recommended_max_memory", lambda: 7)
    monkeypatch.setattr(
        torch.xpu, "get_device_properties", lambda device: SimpleNamespace(total_memory=8)
    )
    assert memory.total_bytes(torch.device("mps")) == 7
    assert memory.total_bytes(torch.device("xpu")) == 8


def test_little_memory_makes_small_batches(lm, monkeypatch):
    monkeypatch.setattr(memory, "LEAST", 1)
    prompts = [[1, 2, 3, 4 + i] for i in range(8)]
    items = [(one, [[5, 6]]) for one in prompts]

    def run():
        """How many batches each call took, and what it found."""
        counts = [[], [], []]
        found = (
            greedy(lm, prompts, 4, advance=counts[0].append),
            score_continuations(lm, items, advance=counts[1].append),
            [one.sum().item() for one in token_nlls(lm, prompts, advance=counts[2].append)],
        )
        return list(map(len, counts)), found

    (one, whole) = run()
    assert one == [1, 1, 1]
    given(monkeypatch, lm, 16)
    (several, parts) = run()
    assert several[:2] == [4, 4]
    assert several[2] > 1
    assert parts[0] == whole[0]
    for left, right in zip(parts[1], whole[1], strict=True):
        assert left[0][0] == pytest.approx(right[0][0], abs=1e-5)
    assert parts[2] == pytest.approx(whole[2], abs=1e-4)
