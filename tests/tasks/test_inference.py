from collections import Counter

import pytest
import torch
from recurrent import recurrent_model
from tiny import tiny_model, tiny_tokenizer

from lirefs import Direction, Steer, prompt_lengths, wrap
from lirefs.errors import TaskError
from lirefs.model.batching import batches_by_tokens
from lirefs.tasks.inference import greedy, option_log_likelihoods, score_continuations, token_nlls

FEW_SHOT = "a long beginning that every prompt shares: "
FAMILIES = ["llama", "gpt2", "gpt_neox", "opt", "bloom", "falcon", "gemma2", "olmo2"]


def model_of(family):
    return wrap(tiny_model(family), tiny_tokenizer())


def reference_logprobs(lm, ids):
    with torch.no_grad():
        logits = lm.model(torch.tensor([ids]), use_cache=False).logits[0, :-1]
    picked = torch.tensor(ids[1:])[:, None]
    return torch.log_softmax(logits, -1).gather(1, picked)[:, 0]


@pytest.mark.parametrize("shared", ["", FEW_SHOT])
@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_agrees_with_one_row_at_a_time_without_cache(family, shared):
    lm = model_of(family)
    prompts = lm.encode([shared + text for text in ("x", "something else", "why not")])
    for budget in (1, 4096):
        outputs = greedy(lm, prompts, 6, batch_tokens=budget)
        for prompt, output in zip(prompts, outputs):
            ids = list(prompt)
            for _ in range(6):
                with torch.no_grad():
                    ids.append(
                        int(lm.model(torch.tensor([ids]), use_cache=False).logits[0, -1].argmax())
                    )
            assert output == ids[-6:]


def test_greedy_stops_each_row_where_asked(lm):
    prompts = lm.encode([FEW_SHOT + "x", FEW_SHOT + "yy"])
    free = greedy(lm, prompts, 10)
    stopped = greedy(lm, prompts, 10, stop=lambda token: token == free[0][3])
    assert stopped[0] == free[0][: free[0].index(free[0][3]) + 1]


@pytest.mark.parametrize("shared", ["", FEW_SHOT])
@pytest.mark.parametrize("family", [*FAMILIES, "mamba", "rwkv"])
def test_each_prompt_has_a_length_of_its_own(family, shared):
    lm = model_of(family) if family in FAMILIES else wrap(recurrent_model(family), tiny_tokenizer())
    prompts = lm.encode([f"{shared}{i}" + "?" * (i % 3) for i in range(7)])
    free = greedy(lm, prompts, 9)
    limits = [9, 1, 4, 4, 2, 7, 1]
    counted = []
    found = greedy(lm, prompts, limits, advance=counted.append)
    assert found == [row[:limit] for row, limit in zip(free, limits)]
    assert sum(counted) == 7
    with pytest.raises(TaskError, match="2 numbers for 7 prompts"):
        greedy(lm, prompts, [1, 2])
    with pytest.raises(TaskError, match=r"max_new_tokens\[6\] must be at least 1"):
        greedy(lm, prompts, [*limits[:6], 0])


def test_no_row_goes_beyond_the_last_position_for_the_sake_of_another():
    lm = model_of("gpt2")
    long, short = [5] * 127, [6, 7]
    prompts, limits = [long, *[short] * 20], [2, *[20] * 20]  # one of many, which would be held
    assert greedy(lm, prompts, limits) == [greedy(lm, [long], 2)[0], *greedy(lm, [short] * 20, 20)]
    with pytest.raises(TaskError, match="item 0 needs 129 positions"):
        greedy(lm, prompts, [3, *limits[1:]])


@pytest.mark.parametrize("shared", ["", FEW_SHOT])
@pytest.mark.parametrize("family", FAMILIES)
def test_rows_that_stop_leave_the_batch_and_change_no_other(family, shared):
    lm = model_of(family)
    prompts = lm.encode([f"{shared}{i}" + "?" * (i % 4) for i in range(9)])
    free = greedy(lm, prompts, 12)
    counts = Counter(token for row in free for token in set(row[:10]))
    last = next(token for token, count in counts.items() if 2 <= count < len(prompts))
    rows = []
    handle = lm.model.register_forward_hook(
        lambda module, args, kwargs, out: rows.append(len(out.logits)), with_kwargs=True
    )
    stopped = greedy(lm, prompts, 12, stop=lambda token: token == last)
    handle.remove()
    for whole, cut in zip(free, stopped):
        end = next((i + 1 for i, token in enumerate(whole) if token == last), 12)
        assert cut == whole[:end]
    assert rows[-1] < len(prompts)


def test_a_batch_whose_rows_stop_together_ends(lm):
    prompts = lm.encode(["x", "yy", "z"])
    assert greedy(lm, prompts, 10, stop=lambda token: True) == [
        row[:1] for row in greedy(lm, prompts, 10)
    ]


def test_greedy_ends_each_row_at_a_text_of_several_tokens(lm):
    prompts = lm.encode([FEW_SHOT + text for text in ("x", "yy", "why")])
    free = greedy(lm, prompts, 20)
    texts = ["", lm.tokenizer.decode(free[0][3:6]), lm.tokenizer.decode(free[1][7:9])]
    for whole, cut in zip(free, greedy(lm, prompts, 20, until=texts)):
        said = [lm.tokenizer.decode(whole[: end + 1]) for end in range(20)]
        first = (i for i, text in enumerate(said) if any(t in text for t in texts[1:]))
        assert cut == whole[: next(first, 19) + 1]
    assert len(greedy(lm, prompts, 20, until=texts)[0]) <= 6


@pytest.mark.parametrize("family", FAMILIES)
def test_continuations_are_scored_after_their_prompt(family):
    lm = model_of(family)
    pairs = [("q", "yes you"), ("q", "y"), ("q", "yes"), ("another question", " it is")]
    prompts = [lm.encode([prompt])[0] for prompt, _ in pairs]
    rests = [lm.encode([text], add_special_tokens=False)[0] for _, text in pairs]
    said = greedy(lm, prompts[:1], 3)[0]
    rests[2:2] = [said, [*said[:2], (said[2] + 1) % 100]]
    items = [(prompts[0], rests[:5]), (prompts[3], rests[5:])]
    for budget in (1, 4096):
        found = score_continuations(lm, items, batch_tokens=budget)
        for (prompt, continuations), values in zip(items, found):
            for rest, (value, _) in zip(continuations, values):
                expected = reference_logprobs(lm, [*prompt, *rest])[len(prompt) - 1 :].sum()
                assert value == pytest.approx(float(expected), abs=1e-4)
        assert [greedily for _, greedily in found[0]][2:4] == [True, False]


def test_padding_may_reach_past_the_last_position():
    lm = model_of("gpt2")  # 128 positions
    long, short = lm.encode(["x" * 120, "y"])
    items = [(long, [[5, 6]]), (short, [list(range(3, 60))])]
    (((value, _),), _) = score_continuations(lm, items)
    expected = reference_logprobs(lm, [*long, 5, 6])[-2:].sum()
    assert value == pytest.approx(float(expected), abs=1e-4)


@pytest.mark.parametrize("shared", ["", FEW_SHOT])
@pytest.mark.parametrize("family", FAMILIES)
def test_option_log_likelihoods_agree_with_full_sequences(family, shared):
    lm = model_of(family)
    texts = [
        [f"{shared}q{i}" + "?" * i + option for option in options]
        for i, options in enumerate([(" yes", " no", " perhaps"), (" a", " b"), (" one", " other")])
    ]
    items = [lm.encode(options) for options in texts]
    found = option_log_likelihoods(lm, items)
    for options, values in zip(items, found):
        shortest = min(map(len, options))
        start = next(
            (i for i in range(shortest) if len({row[i] for row in options}) > 1), shortest - 1
        )
        for ids, value in zip(options, values):
            expected = float(reference_logprobs(lm, ids)[start - 1 :].sum())
            assert value == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_token_nlls_agree_with_single_texts(family):
    lm = model_of(family)
    texts = lm.encode(["first text", "a second and longer text", "3"])
    for ids, nll in zip(texts, token_nlls(lm, texts)):
        torch.testing.assert_close(nll, -reference_logprobs(lm, ids), atol=1e-5, rtol=1e-5)


def test_batches_hold_the_budget_and_every_item_once():
    lengths = [5, 1, 9, 3, 3, 12, 0]
    batches = batches_by_tokens(lengths, 12)
    assert sorted(index for batch in batches for index in batch) == list(range(7))
    for batch in batches:
        assert len(batch) == 1 or len(batch) * max(lengths[i] for i in batch) <= 12


def test_a_batch_with_enough_tokens_takes_no_much_shorter_item():
    lengths = [10, 8, 7, 7, 2, 1]
    assert batches_by_tokens(lengths, 100) == [[0, 1, 2, 3, 4, 5]]
    assert batches_by_tokens(lengths, 100, enough=20) == [[0, 1], [2, 3, 4], [5]]
    assert batches_by_tokens(lengths, 100, enough=0) == [[0, 1], [2, 3], [4], [5]]
    assert batches_by_tokens([3, 3, 3], 5, enough=1) == [[0], [1], [2]]


@pytest.mark.parametrize("scope", ["prompt", "generated", "last_prompt_token"])
@pytest.mark.parametrize("shared", ["", FEW_SHOT])
def test_scopes_know_the_prompt_in_batches_with_a_shared_beginning(shared, scope):
    lm = model_of("llama")
    direction = Direction(torch.randn(32, generator=torch.Generator().manual_seed(0)), 1)
    steer = Steer(direction, "add", 3.0, scope=scope)
    prompts = lm.encode([shared + text for text in ("x", "something else", "why not")])
    items = [lm.encode([shared + q + o for o in (" yes", " no")]) for q in ("one", "other?")]
    with steer.apply(lm.model):
        outputs = greedy(lm, prompts, 5)
        found = option_log_likelihoods(lm, items)
        for prompt, output in zip(prompts, outputs):
            ids = list(prompt)
            for _ in range(5):
                with torch.no_grad(), prompt_lengths(len(prompt)):
                    logits = lm.model(torch.tensor([ids]), use_cache=False).logits
                ids.append(int(logits[0, -1].argmax()))
            assert output == ids[-5:]
        for options, values in zip(items, found):
            start = next(i for i, (a, b) in enumerate(zip(*options)) if a != b)
            for option, value in zip(options, values):
                with prompt_lengths(start):
                    logprobs = reference_logprobs(lm, option)
                assert value == pytest.approx(float(logprobs[start - 1 :].sum()), abs=1e-4)
    assert outputs != greedy(lm, prompts, 5)
