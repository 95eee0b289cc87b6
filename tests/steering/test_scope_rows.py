"""Scopes and strengths that are made for certain rows of a batch."""

import pytest
import torch
from steering_tools import direction

from lirefs import Steer, prompt_lengths, scope
from lirefs.errors import ScopeError
from lirefs.tasks.inference import greedy


@pytest.mark.parametrize("kind", ["strengths", "mask", "spans"])
def test_unrelated_prompts_are_not_taken_for_beams(kind, lm):
    one, texts = direction(layer=1), ["ab", "cd", "ef", "gh"]
    ranges = [[(0, 1)], [(1, 2)]]
    steer = {
        "strengths": Steer(one, "add", [1.0, 5.0]),
        "mask": Steer(one, "add", scope=scope.mask([[True], [False]])),
        "spans": Steer(one, "add", scope=scope.spans(lm.tokenizer, texts[:2], ranges)),
    }[kind]
    batch = lm.pad(lm.encode(texts))
    with steer.apply(lm.model), torch.no_grad():
        for four in (
            lambda: lm.generate(texts, max_new_tokens=1),
            lambda: lm.model(**batch),
        ):
            with pytest.raises(ScopeError, match=r"made for 2 row.* 4 prompt"):
                four()
        with prompt_lengths([3, 3, 3, 3]), pytest.raises(ScopeError, match="4 prompt"):
            lm.model(**batch)
        lm.generate(texts[:2], max_new_tokens=1, num_beams=2)
        with prompt_lengths([3, 3]):  # four rows of two prompts, as stated
            lm.model(**batch)


@pytest.mark.parametrize("kind", ["last_prompt_token", "generated"])
def test_rows_that_leave_a_batch_before_others_leave_them_as_they_are(kind, lm):
    ids = lm.encode(["a", "bcd", "efghij", "klm", "nopqrstu"])

    def ended(token):
        return token % 5 == 0

    with Steer(direction(layer=1), "add", 3.0, scope=kind).apply(lm.model):
        alone = [greedy(lm, [one], 12, stop=ended)[0] for one in ids]
        assert greedy(lm, ids, 12, stop=ended) == alone
    assert len(set(map(len, alone))) > 1
