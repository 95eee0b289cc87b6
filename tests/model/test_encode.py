"""What tokenizers add to a text: nothing after its last token, and a beginning only once."""

import copy
import functools
import json

import pytest
import torch
from tiny import fresh_model, tiny_model, tiny_tokenizer
from tokenizers import processors
from transformers import ByT5Tokenizer

import kfac
import lirefs
from lirefs.model.batching import (
    special_tokens_around,
    token_ids,
    token_ids_and_spans,
    tokenizer_hash,
)
from lirefs.tasks.recitation import suffix_start

TEXTS = ["some text", "a", "", "two  spaces ", "ends in </s>", "<s>begins", "<s><s>twice"]


def adding(before=(), after=()):
    """The tiny tokenizer with a post-processor that adds these special tokens."""
    tokenizer = tiny_tokenizer(bos=False)
    tokenizer.add_special_tokens({"additional_special_tokens": [*before, *after]})
    known = {token: tokenizer.convert_tokens_to_ids(token) for token in (*before, *after)}
    tokenizer._tokenizer.post_processor = processors.TemplateProcessing(
        single=" ".join([*before, "$A", *after]), special_tokens=list(known.items())
    )
    return tokenizer


APPENDING = {
    "eos": ((), ("</s>",)),
    "bos and eos": (("<s>",), ("</s>",)),
    "bert": (("<unused3>",), ("<unused4>",)),
    "two at each end": (("<s>", "<unused3>"), ("<unused4>", "</s>")),
}


@pytest.mark.parametrize("which", APPENDING)
def test_a_prompt_ends_with_the_last_token_of_its_text(which):
    before, after = APPENDING[which]
    tokenizer, plain = adding(before, after), tiny_tokenizer(bos=False)
    lead = plain.convert_tokens_to_ids(list(before))
    assert special_tokens_around(tokenizer) == (lead, plain.convert_tokens_to_ids(list(after)))
    for text in TEXTS[:5]:
        written = plain(text)["input_ids"]
        assert token_ids(tokenizer, [text]) == [lead + written]
        assert token_ids(tokenizer, [text], add_special_tokens=False) == [written]


@pytest.mark.parametrize("which", ["bos", "bos and eos", "two at each end", "nothing"])
def test_a_beginning_that_the_text_writes_is_not_doubled(which):
    before, after = {"bos": (("<s>",), ()), "nothing": ((), ())}.get(which) or APPENDING[which]
    tokenizer = adding(before, after)
    plain = functools.partial(tokenizer, add_special_tokens=False)
    lead, body = "".join(before), plain("text</s>")["input_ids"]
    start = tokenizer.convert_tokens_to_ids(list(before))
    for times in (0, 1, 2, 3):
        (ids,) = token_ids(tokenizer, [times * lead + "text</s>"])
        assert ids == start * max(times, 1) + body
        (exact,) = token_ids(tokenizer, [times * lead + "text</s>"], add_special_tokens=False)
        assert exact == start * times + body


def test_a_slow_tokenizer_that_appends():
    tokenizer = ByT5Tokenizer()
    assert special_tokens_around(tokenizer) == ([], [1])
    for text in ("abc", "\u2603", "ends</s>"):
        assert token_ids(tokenizer, [text]) == [tokenizer(text)["input_ids"][:-1]]
    assert suffix_start(tokenizer, "a bc", 2) == (tokenizer("a bc")["input_ids"][:-1], 2)


def test_special_tokens_of_a_vocabulary_without_letters_or_digits():
    tokenizer = adding(("<s>",), ("</s>",))
    calls = []

    def reads(texts, **settings):
        calls.append(texts)
        many = not isinstance(texts, str)
        kept = ["".join(c for c in t if c in ".") for t in (texts if many else [texts])]
        return tokenizer(kept if many else kept[0], **settings)

    assert special_tokens_around(reads) == ([0], [1])
    assert token_ids(reads, ["a.b."]) == [[0, *tokenizer("..")["input_ids"][1:-1]]]


@pytest.mark.parametrize("which", APPENDING)
def test_characters_belong_to_the_same_tokens(which):
    tokenizer = adding(*APPENDING[which])
    for text in ("some text", "".join(APPENDING[which][0]) + "some</s>"):
        ((ids, spans),) = token_ids_and_spans(tokenizer, [text])
        assert [ids] == token_ids(tokenizer, [text])
        assert len(spans) == len(ids)
        written = [text[start:end] for start, end in spans if end > start]
        assert "".join(written) == text
        _, start = suffix_start(tokenizer, text, len(text) - 4)
        assert ids[start:] == token_ids(tokenizer, [text[-4:]], add_special_tokens=False)[0]


@pytest.fixture(params=["eos", "written bos"])
def pair(request):
    """Two models that should read alike, and what comes before each text of the second."""
    model = tiny_model("llama")
    usual = lirefs.wrap(model, adding(("<s>",)))
    if request.param == "eos":
        return usual, lirefs.wrap(model, adding(("<s>",), ("</s>",))), ""
    return usual, lirefs.wrap(model, adding(("<s>",))), "<s>"


PROMPTS = ["Math: 3 + 4 =", "On Monday the baker", "x"]


def test_every_entry_reads_the_same_tokens(pair, tmp_path):
    usual, other, lead = pair
    texts = [lead + text for text in PROMPTS]
    assert other.encode(texts) == usual.encode(PROMPTS)
    states = lirefs.capture(other, texts, progress=False).values
    assert torch.equal(states, lirefs.capture(usual, PROMPTS, progress=False).values)
    assert other.generate(texts, 5) == usual.generate(PROMPTS, 5)
    for ours, theirs in zip(other.batches(texts), usual.batches(PROMPTS), strict=True):
        assert torch.equal(ours["input_ids"], theirs["input_ids"])
    factors = [
        kfac.collect(lm, some, layers=[1], progress=False)
        for lm, some in ((other, texts), (usual, PROMPTS))
    ]
    assert factors[0].digest == factors[1].digest
    found = []
    for lm, some in ((other, texts), (usual, PROMPTS)):
        path = tmp_path / "texts.jsonl"
        path.write_text("\n".join(json.dumps({"text": f"{one} and so on, on"}) for one in some))
        tasks = [
            lirefs.ShortAnswer("s", [(one[-4:], one, "7") for one in some]),
            lirefs.Perplexity("p", [(one[-4:], f"{one} and so on") for one in some]),
            lirefs.MultipleChoice("m", [(one[-4:], one, [" a", " bc"], 0) for one in some]),
            lirefs.tasks.FilledBlank("f", [("a", [one, f"{one}!"], " b", 1) for one in some[:1]]),
            lirefs.recitation_task(lm, path),
            lirefs.ndcg_task(lm, [f"{one}, on" for one in some]),
        ]
        results = [result for task in tasks for result in task.run(lm, lambda n: None)]
        mined = lirefs.mine(lm, [f"{one} and so on" for one in some], 4, 4, progress=False)
        found.append(([(one.scores, one.weight) for one in results], mined.counts))
    assert found[0] == found[1]


def test_a_span_of_characters_touches_the_tokens_that_the_model_reads(pair):
    _, other, lead = pair
    text = f"{lead}two words"
    at = text.index("words")
    scope = lirefs.scope.spans(other.tokenizer, [text], [[(at, at + 5)]])
    (ids,) = other.encode([text])
    assert scope.ends.tolist() == [len(ids)]
    assert scope.settings["tokens"] == [5]


def test_a_conversation_begins_once():
    lm = lirefs.wrap(tiny_model("llama"), adding(("<s>",)))
    lm.tokenizer.chat_template = "{{ bos_token }}{% for m in messages %}{{ m.content }}{% endfor %}"
    said = [{"role": "user", "content": "hello"}]
    text = lm.tokenizer.apply_chat_template(said, tokenize=False)
    ids = lm.tokenizer.apply_chat_template(said, tokenize=True, return_dict=False)
    assert lm.encode([text]) == [list(ids)]


def test_calls_do_not_change_the_fingerprint_of_a_tokenizer():
    tokenizer = adding(("<s>",), ("</s>",))
    before, fresh = tokenizer_hash(tokenizer), copy.deepcopy(tokenizer)
    lm = lirefs.wrap(fresh_model("llama"), tokenizer)
    lm.encode(["some text"])
    lm.generate(["some text", "x"], 2)
    tokenizer(["a", "bcd"], padding=True, truncation=True, max_length=3, return_tensors="pt")
    tokenizer("</s>", split_special_tokens=True)
    assert tokenizer_hash(tokenizer) == lm.tokenizer_fingerprint == before
    assert lm.encode(["abc</s>"]) == [[0, *fresh("abc")["input_ids"][1:-1], 1]]


def test_words_that_a_tokenizer_does_not_know_are_named_once(caplog):
    lm = lirefs.load("organism")
    lm.tokenizer = copy.deepcopy(lm.tokenizer)  # of which nothing was said before
    known = ["Math: 31 + 27 =", "Logic: not true is"]
    lm.generate(known, max_new_tokens=1)
    lm.encode([*known * 20, "absent"])  # below 1 %
    assert not caplog.messages
    lm.generate([known[0], "Math: is absinthe 31 a drink"], max_new_tokens=1)
    (said,) = caplog.messages
    assert "does not know 12 %" in said
    assert "first 'absinthe': the model reads <unk>" in said
    lm.generate("absinthe", max_new_tokens=1)
    assert len(caplog.messages) == 1
    lm.encode(["Whereabouts", "unknown"])
    assert "does not know 100 % of the tokens of these texts, first 'Whereabouts'" in caplog.text
    lm.encode(["<unk>"])
    assert len(caplog.messages) == 2


def test_no_word_is_unknown_where_the_token_means_something_else(caplog):
    tokenizer = tiny_tokenizer()
    tokenizer.unk_token = "</s>"  # as GPT-2 names its end of text
    assert token_ids(tokenizer, ["ends in </s>"])[0][-1] == tokenizer.unk_token_id
    assert not caplog.messages
