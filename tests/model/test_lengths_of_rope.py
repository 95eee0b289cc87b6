"""Rotary positions that depend on the longest row: rows of both sides never share a batch."""

import pytest
import torch
from tiny import fresh_model, tiny_tokenizer

import kfac
import lirefs
from lirefs.errors import CaptureError, SettingError, TaskError
from lirefs.tasks.inference import greedy, score_continuations, token_nlls

LONGROPE = {
    "rope_scaling": {
        "rope_type": "longrope",
        "long_factor": [3.0] * 4,
        "short_factor": [1.0] * 4,
        "rope_theta": 1e4,
    },
    "original_max_position_embeddings": 10,
    "max_position_embeddings": 64,
}
DYNAMIC = {
    "rope_scaling": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4},
    "max_position_embeddings": 12,
}
SHORT = list(range(40, 45))
OTHER = list(range(50, 57))
LONG = list(range(60, 84))


def lm_of(settings, family="phi3"):
    return lirefs.wrap(fresh_model(family, **settings), tiny_tokenizer())


def plain(lm, ids):
    with torch.no_grad():
        return lm.model(torch.tensor([ids]), use_cache=False).logits[0].log_softmax(-1)


def continued(lm, prompt, steps):
    row = list(prompt)
    for _ in range(steps):
        row.append(int(plain(lm, row)[-1].argmax()))
    return row[len(prompt) :]


def test_the_length_is_read_off_the_configuration():
    traits = lm_of(LONGROPE).traits
    assert traits.rope == 10
    assert traits.within(10) == traits
    assert not any(getattr(traits.within(11), way) for way in ("left", "right", "cache", "shared"))
    assert "rotary positions change at: 10" in str(traits)
    assert lm_of({}).traits.rope is None


@pytest.mark.parametrize("company", [[LONG], [LONG, OTHER], [OTHER]])
def test_a_row_does_not_depend_on_its_company(company):
    lm = lm_of(LONGROPE)
    rows = [SHORT, *company]
    states = lirefs.capture(lm, rows, progress=False).values
    assert torch.allclose(
        states[0], lirefs.capture(lm, [SHORT], progress=False).values[0], atol=1e-5
    )
    nlls = token_nlls(lm, rows)
    for row, nll in zip(rows, nlls):
        expected = -plain(lm, row)[:-1].gather(1, torch.tensor(row[1:])[:, None])[:, 0]
        assert torch.allclose(nll, expected, atol=1e-4)
    options = [[33, 34], [35]]
    for row, found in zip(rows, score_continuations(lm, [(row, options) for row in rows])):
        for option, (value, _) in zip(options, found):
            likely = plain(lm, [*row, *option])[len(row) - 1 : -1]
            expected = float(likely.gather(1, torch.tensor(option)[:, None]).sum())
            assert value == pytest.approx(expected, abs=1e-4)


def test_generation_across_the_length_is_that_of_plain_passes():
    lm = lm_of(LONGROPE)
    prompts = [SHORT, OTHER, LONG]
    assert greedy(lm, prompts, 6) == [continued(lm, prompt, 6) for prompt in prompts]
    texts = [lm.tokenizer.decode(prompt) for prompt in prompts]
    alone = [lm.generate(text, max_new_tokens=6) for text in texts]
    assert lm.generate(texts, max_new_tokens=6) == alone


def test_factors_of_texts_together_are_those_of_each():
    lm = lm_of(LONGROPE)
    texts = ["short", "a text of more tokens than ten"]
    settings = {"layers": [1], "progress": False, "labels": "data"}
    parts = [kfac.collect(lm, [text], **settings) for text in texts]
    together, apart = kfac.collect(lm, texts, **settings), kfac.merge(parts)
    for name in together.names:
        assert torch.allclose(together.A(name), apart.A(name), rtol=1e-4, atol=1e-4)


def test_dynamic_positions_that_remember_are_refused_by_name():
    lm = lm_of(DYNAMIC, "llama")
    assert len(greedy(lm, [SHORT], 4)[0]) == 4
    for call, error in (
        (lambda: lirefs.capture(lm, [SHORT, LONG], progress=False), CaptureError),
        (lambda: token_nlls(lm, [LONG]), TaskError),
        (lambda: greedy(lm, [SHORT], 20), TaskError),
        (lambda: lm.generate("a text of more tokens than twelve"), SettingError),
    ):
        with pytest.raises(error, match="dynamic rotary positions depend on"):
            call()
