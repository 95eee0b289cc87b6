"""Tokenizers that read texts otherwise are others."""

import pytest
from tiny import tiny_model, tiny_tokenizer
from tokenizers import normalizers, pre_tokenizers, processors

from lirefs import compare, wrap
from lirefs.tasks import Perplexity


def joins_words(tokenizer):
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()


def begins_otherwise(tokenizer):
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="</s> $A", special_tokens=[("</s>", 1)]
    )


def writes_small(tokenizer):
    tokenizer.backend_tokenizer.normalizer = normalizers.Lowercase()


@pytest.mark.parametrize("change", [joins_words, begins_otherwise, writes_small])
def test_a_tokenizer_that_was_changed_is_another(change, tmp_path):
    lm = wrap(tiny_model("llama"), tiny_tokenizer())
    task = Perplexity("texts", [("0", "A b C")])

    def score(**settings):
        found = compare(lm, {}, [task], resamples=1, progress=False, **settings)
        return found.score("unchanged", "texts")

    before, first = lm.tokenizer_fingerprint, score(journal=tmp_path)
    assert lm.tokenizer_fingerprint == before
    change(lm.tokenizer)
    assert lm.tokenizer_fingerprint != before
    assert score(journal=tmp_path) == score() != first
