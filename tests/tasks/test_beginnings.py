"""Prompts of several subjects in one call: each subject's beginning is computed once."""

from random import Random

import pytest
import torch
from passes import counted
from recurrent import recurrent_model
from tiny import tiny_model, tiny_tokenizer

from lirefs import Direction, Steer, wrap
from lirefs.tasks.batches import cached
from lirefs.tasks.inference import greedy, score_continuations
from lirefs.tasks.items import common_prefix, grouped_by_beginning

SUBJECTS = ("birds and their nests, ", "rivers of the north, ", "", "how clocks are built, ")


def prompts_of(lm, each=5):
    """Prompts of four subjects, mixed; one subject has no beginning of its own."""
    asked = [f"About {one}{i}" + "?" * (i % 3) for one in SUBJECTS for i in range(each)]
    Random(0).shuffle(asked)
    return lm.encode(asked)


def model_of(family):
    made = recurrent_model if family in ("mamba", "rwkv") else tiny_model
    return wrap(made(family), tiny_tokenizer())


@pytest.fixture(autouse=True)
def cheap(monkeypatch):
    """Few tokens are worth a group of their own, as the prompts here are short."""
    monkeypatch.setattr(cached, "SAVED", 8)


@pytest.mark.parametrize("steered", [False, True])
@pytest.mark.parametrize("family", ["llama", "gpt2", "bloom", "gemma2", "mamba", "rwkv"])
def test_mixed_subjects_are_answered_as_alone(family, steered):
    lm = model_of(family)
    prompts = prompts_of(lm)
    vector = torch.randn(lm.width, generator=torch.Generator().manual_seed(0))
    steer = Steer(Direction(vector, 1), "add", 2.0 * steered, scope="last_prompt_token")
    items = [(prompt, [[5, 6], [7], [8, 9, 10]]) for prompt in prompts]
    for budget in (1, 60, 4096):
        counts = []
        with steer.apply(lm.model):
            texts = greedy(lm, prompts, 5, batch_tokens=budget, advance=counts.append)
            scored = score_continuations(lm, items, batch_tokens=budget)
            assert sum(counts) == len(prompts)
            for prompt, text, found in zip(prompts, texts, scored, strict=True):
                assert [text] == greedy(lm, [prompt], 5)
                (alone,) = score_continuations(lm, [(prompt, items[0][1])])
                assert [right for _, right in found] == [right for _, right in alone]
                wanted = [value for value, _ in alone]
                assert [value for value, _ in found] == pytest.approx(wanted, abs=1e-4)


def test_the_beginning_of_each_subject_runs_once():
    lm = model_of("llama")
    prompts = prompts_of(lm)
    with counted(lm, 0) as tokens:
        score_continuations(lm, [(prompt, [[5]]) for prompt in prompts])
    # Three beginnings, and what follows each; the fourth subject shares too little.
    assert len(tokens) == 7
    assert sum(tokens) < 2 * max(map(len, prompts)) + 7 * 8


def ids(text):
    return list(map(ord, text))


def test_groups_share_more_than_all_do():
    long = [ids(one[0] + one[1] * 20 + one[2]) for one in ("xa1", "xb1", "xa2", "xb2", "xc1")]
    assert grouped_by_beginning(long, 8, 15) == [[0, 2], [1, 3], [4]]
    assert grouped_by_beginning(long, 8, 20) == [[0, 1, 2, 3, 4]]  # each saves 20, but for an x
    assert grouped_by_beginning(long, 21, 1) == [[0, 1, 2, 3, 4]]
    nested = [ids("x" * 20 + middle * 20 + last) for middle in "ab" for last in "123"]
    other = [ids("y" * 30 + last) for last in "12"]
    assert grouped_by_beginning(nested + other, 8, 8) == [[0, 1, 2], [3, 4, 5], [6, 7]]
    # Their own beginnings would save 40 tokens each, and cost the 20 that all share again.
    assert grouped_by_beginning(nested, 8, 21) == [[0, 1, 2, 3, 4, 5]]
    assert grouped_by_beginning([], 8, 8) == []
    assert grouped_by_beginning([[1]], 1, 1) == [[0]]


def test_many_pairs_behind_one_long_beginning_stay_together():
    rows = [[1] * 200 + [s] * 25 + [j] for s in range(50) for j in (2, 3)]
    assert grouped_by_beginning(rows, 8, 16) == [list(range(100))]


def test_equal_prompts_end_the_search():
    for one in ([1], [1] * 30):
        assert grouped_by_beginning([one] * 3, 1, 1) == [[0, 1, 2]]


def test_a_short_prompt_does_not_keep_others_from_sharing():
    rows = [[1], *([1, *([middle] * 30), last] for middle in (7, 8) for last in (2, 3))]
    assert grouped_by_beginning(rows, 8, 16) == [[0], [1, 2], [3, 4]]
    assert grouped_by_beginning([[1] * 9, [1] * 40 + [2], [1] * 40 + [3]], 8, 8) == [[0], [1, 2]]


def test_a_little_more_in_common_does_not_hide_what_comes_after():
    begin = [("s", "a"), ("s", "b"), ("sh", "c"), ("sh", "d")]  # as high school biology and physics
    rows = [ids(one + subject * 30 + last) for one, subject in begin for last in "123"]
    assert grouped_by_beginning(rows, 8, 16) == [[0, 1, 2], [3, 4, 5], [6, 7, 8], [9, 10, 11]]


def test_prompts_that_continue_one_another_are_sorted_out():
    nested = [[5] * length for length in range(1, 1500)]
    (groups,) = [grouped_by_beginning(nested, 8, 256)]
    assert sorted(row for group in groups for row in group) == list(range(1499))


def test_groups_are_a_partition_and_save_what_they_must():
    draw = Random(0)
    split = 0
    for _ in range(400):
        common = [9] * draw.choice((0, 5, 40))
        rows = [[draw.randrange(3) for _ in range(draw.randint(1, 9))] for _ in range(12)]
        rows += [rows[draw.randrange(12)] + [9] * draw.randrange(6) for _ in range(12)]
        rows = [common + one for one in rows]
        groups = grouped_by_beginning(rows, 2, 4)
        assert sorted(row for group in groups for row in group) == list(range(len(rows)))

        def tokens(group, rows=rows):
            """What a group computes: its beginning once, and the rest of each row."""
            some = [rows[row] for row in group]
            shared = min(common_prefix(*some), *(len(one) - 1 for one in some))
            return shared + sum(len(one) - shared for one in some)

        assert sum(map(tokens, groups)) <= tokens(range(len(rows))) - 4 * (len(groups) - 1)
        split += len(groups) > 1
    assert split > 50


def test_long_answers_are_decoded_together(monkeypatch):
    monkeypatch.setattr(cached, "SAVED", 16)
    lm = model_of("llama")
    prompts = prompts_of(lm)
    batches = []
    for limit in (1, 12):
        counts = []
        greedy(lm, prompts, limit, advance=counts.append)
        batches.append(len(counts))
    assert batches[1] == 1 < batches[0]
