import pytest
import torch
from recurrent import recurrent_model
from tiny import fresh_model, tiny_model, tiny_tokenizer

from lirefs import Direction, Recitation, Steer, wrap
from lirefs.errors import TaskError
from lirefs.tasks.inference import greedy
from lirefs.tasks.recitation import StressTest

FAMILIES = ["llama", "gpt2", "gpt_neox", "opt", "bloom", "falcon", "gemma2", "olmo2"]
FEW_SHOT = "a long beginning that every prompt shares: "
LIMITS = [9, 1, 4, 9, 2, 7, 9, 9]


def changed_at(row, position):
    return [token if i != position else (token + 1) % 50 for i, token in enumerate(row)]


def passes_of(model, work):
    sizes = []
    handle = model.register_forward_pre_hook(
        lambda module, args, named: sizes.append(named["input_ids"].shape[1]), with_kwargs=True
    )
    try:
        return work(), sizes
    finally:
        handle.remove()


@pytest.fixture
def asked(lm):
    prompts = lm.encode([f"{i}" + "?" * (i % 3) for i in range(len(LIMITS))])
    return prompts, greedy(lm, prompts, LIMITS)


@pytest.mark.parametrize("shared", ["", FEW_SHOT])
@pytest.mark.parametrize("family", [*FAMILIES, "mamba", "rwkv"])
def test_drafts_right_or_wrong_change_no_continuation(family, shared):
    lm = wrap(
        tiny_model(family) if family in FAMILIES else recurrent_model(family), tiny_tokenizer()
    )
    prompts = lm.encode([f"{shared}{i}" + "?" * (i % 3) for i in range(len(LIMITS))])
    alone = [greedy(lm, [prompt], limit)[0] for prompt, limit in zip(prompts, LIMITS)]
    mixed = [changed_at(row, position) for row, position in zip(alone, (0, 9, 3, 8, 1, 6, 9, 1))]
    for drafts in (alone, mixed):
        assert greedy(lm, prompts, LIMITS, drafts=drafts) == alone
    assert greedy(lm, prompts, LIMITS, drafts=mixed, batch_tokens=1) == alone


def test_right_drafts_cost_no_step_for_each_token(lm, asked):
    prompts, free = asked
    _, before = passes_of(lm.model, lambda: greedy(lm, prompts, LIMITS))
    found, sizes = passes_of(lm.model, lambda: greedy(lm, prompts, LIMITS, drafts=free))
    assert found == free
    assert before.count(1) == 8
    assert len(sizes) <= 5  # prompts, and drafts by their length
    wrong = [changed_at(row, 0) for row in free]
    _, sizes = passes_of(lm.model, lambda: greedy(lm, prompts, LIMITS, drafts=wrong))
    assert sizes == before  # a first token that is wrong is known from the prompt


@pytest.mark.parametrize("scope", ["all", "prompt", "generated", "last_prompt_token"])
def test_drafts_are_read_as_steered(lm, asked, scope):
    prompts, unsteered = asked
    vector = torch.randn(lm.model.config.hidden_size, generator=torch.Generator().manual_seed(0))
    with Steer(Direction(vector, 1), "add", 3.0, scope=scope).apply(lm.model):
        free = greedy(lm, prompts, LIMITS)
        for drafts in (free, unsteered):
            assert greedy(lm, prompts, LIMITS, drafts=drafts) == free
    assert free != unsteered


def test_a_draft_ends_where_a_row_ends(lm, asked):
    prompts, free = asked
    last = free[0][3]
    ended = greedy(lm, prompts, LIMITS, stop=lambda token: token == last)
    assert ended != free
    assert greedy(lm, prompts, LIMITS, stop=lambda token: token == last, drafts=free) == ended


def test_nothing_is_recited_where_the_model_overflows():
    lm = wrap(fresh_model("llama"), tiny_tokenizer())
    prompts = lm.encode([f"{i}" for i in range(len(LIMITS))])
    free = greedy(lm, prompts, LIMITS)
    spoilt = free[0][2]
    with torch.no_grad():
        lm.model.get_input_embeddings().weight[spoilt] = torch.inf
    plain = greedy(lm, prompts, LIMITS)
    assert plain[0] == []
    assert greedy(lm, prompts, LIMITS, drafts=free) == plain


def test_drafts_must_be_as_long_as_the_continuations(lm, asked):
    prompts, free = asked
    for drafts in (free[:-1], [row + row for row in free], [[]] * len(free)):
        with pytest.raises(TaskError, match="drafts must be as long"):
            greedy(lm, prompts, LIMITS, drafts=drafts)


@pytest.mark.parametrize("task", [Recitation, StressTest])
def test_recited_texts_cost_one_pass(lm, asked, task):
    prompts, free = asked
    items = [(f"{i}", prompt, row) for i, (prompt, row) in enumerate(zip(prompts, free))]
    results, sizes = passes_of(lm.model, lambda: task("t", items).run(lm, lambda n: None))
    assert [next(iter(one.scores.values())) for one in results] == (
        [1.0] * len(items) if task is Recitation else [float(len(row)) for row in free]
    )
    assert sizes.count(1) <= 1
