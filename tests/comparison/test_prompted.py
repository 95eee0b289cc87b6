"""`lirefs.Prompted`: a text before every prompt, as a variant of a comparison."""

import contextlib
from dataclasses import dataclass

import pytest
import torch
from tiny import fresh_model, tiny_tokenizer

import lirefs
from lirefs import Direction, Prompted, Steer, compare
from lirefs.errors import InterventionError, SettingError, TaskError
from lirefs.tasks import greedy, option_log_likelihoods, token_nlls
from lirefs.tasks.items import ItemTask
from lirefs.tasks.ndcg import RankAgreement, likeliest, ndcg_task
from lirefs.tasks.task import ItemResult

CHATML = (
    "{% if messages[0].role != 'system' %}{{ '|system~be kind|' }}{% endif %}"
    "{% for one in messages %}{{ '|' + one.role + '~' + one.content + '|' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '|assistant~' }}{% endif %}"
)
"""A template that writes a message of the system of its own accord, as many do."""


@pytest.fixture(scope="module")
def lm():
    return lirefs.wrap(fresh_model("llama"), tiny_tokenizer(), name="tiny")


def tasks():
    choices = [("a", "2 + 2 =", [" 4", " 5"], 0), ("b", "3 + 3 =", [" 7", " 6"], 1)]
    return [
        lirefs.ShortAnswer("answers", [("a", "one", "x"), ("b", "three", "y")]),
        lirefs.MultipleChoice("choices", choices),
        lirefs.Recitation("recited", [("a", [0, 5, 6, 7], [8, 9]), ("b", [9, 8, 7], [6, 5])]),
        lirefs.Perplexity("texts", ["a short text", "another one"]),
    ]


def ids(lm, text):
    return lm.encode([text], add_special_tokens=False)[0]


def test_it_stands_before_every_prompt_after_the_first_token(lm):
    prompt, before = [0, *ids(lm, "one")], ids(lm, "say: ")
    wanted = greedy(lm, [[0, *before, *prompt[1:]], [*before, 9, 8]], 4)
    with Prompted("say: ").apply(lm.model):
        assert greedy(lm, [prompt, [9, 8]], 4) == wanted
        assert lm.generate("one", max_new_tokens=4) == lm.tokenizer.decode(wanted[0])
    assert greedy(lm, [prompt], 4) != wanted[:1]


def test_what_is_scored_stays_the_same_tokens(lm):
    text, before = [0, *ids(lm, "a short text")], ids(lm, "say: ")
    options = [[*text, 50], [*text, 51, 52]]
    (whole,) = token_nlls(lm, [[0, *before, *text[1:]]])
    (apart,) = token_nlls(lm, [[*before, 9, 8, 7]])
    likely = option_log_likelihoods(lm, [[[0, *before, *one[1:]] for one in options]])
    with Prompted("say: ").apply(lm.model):
        found = token_nlls(lm, [text, [9, 8, 7]])
        assert option_log_likelihoods(lm, [options])[0] == pytest.approx(likely[0], abs=1e-5)
    assert [len(one) for one in found] == [len(text) - 1, 2]
    torch.testing.assert_close(found[0], whole[len(before) :])
    torch.testing.assert_close(found[1], apart[-2:])  # a first token without context is not scored


def test_next_tokens_are_ranked_after_it(lm):
    text, before = [0, *ids(lm, "a short text")], ids(lm, "say: ")
    after = likeliest(lm, [0, *before, *text[1:]], 5)[len(before) :]
    plain = likeliest(lm, text, 5)
    ranks = [RankAgreement(name, [("a", text, r)]) for name, r in (("p", plain), ("a", after))]
    found = compare(lm, {"asked": Prompted("say: ")}, ranks, resamples=2, progress=False)
    assert found.score("unchanged", "p") == found.score("asked", "a") == pytest.approx(1.0)
    assert found.score("asked", "p") < 1.0
    with Prompted("say: ").apply(lm.model), pytest.raises(TaskError, match="baseline of nDCG"):
        ndcg_task(lm, ["a short text"], k=5)


def test_a_scope_counts_it_as_prompt(lm):
    vector = torch.randn(lm.width, generator=torch.Generator().manual_seed(0))
    last = Steer(Direction(vector, 1), "add", 3.0, scope="last_prompt_token")
    text, before = [0, *ids(lm, "a short text")], ids(lm, "say: ")
    with lirefs.prompt_lengths(len(before) + len(text) // 2), last.apply(lm.model):
        logits = lm.model(**lm.pad([[0, *before, *text[1:]]]), use_cache=False).logits[0].double()
    picked = logits.log_softmax(-1)[range(len(before), len(before) + len(text) - 1), text[1:]]
    for both in (Prompted("say: ") + last, last + Prompted("say: ")):
        with both.apply(lm.model):
            (nll,) = token_nlls(lm, [text])
        torch.testing.assert_close(nll.double(), -picked, rtol=1e-4, atol=1e-4)


def test_the_first_of_two_stands_in_front(lm):
    both = Prompted("one ") + Prompted("two ")
    with Prompted("one two ").apply(lm.model):
        wanted = lm.generate("three", max_new_tokens=4)
    with both.apply(lm.model):
        assert lm.generate("three", max_new_tokens=4) == wanted


def test_it_is_a_variant_like_any_other(lm, tmp_path):
    variants = {"asked": Prompted("say: "), "asked otherwise": Prompted("tell: ")}
    found = compare(lm, variants, tasks(), resamples=50, progress=False)
    assert found.variants == ["unchanged", *variants]
    assert found.provenance["interventions"]["asked"] == {"kind": "prompted", "prefix": "say: "}
    assert found.controls == []
    for task in ("texts", "choices"):
        weights = [[one.weight for one in items[task]] for items in found.results.values()]
        assert weights[0] == weights[1] == weights[2]
    scores = {name: found.score(name, "texts") for name in found.variants}
    assert len(set(scores.values())) == 3
    page = lirefs.write_report(found, tmp_path).read_text("utf-8")
    assert "say: " in page
    assert lirefs.load_comparison(tmp_path).results == found.results


def test_another_prefix_is_another_variant_for_a_journal(lm, tmp_path):
    def scored(prompt, journal=tmp_path / "j"):
        some = compare(lm, {"asked": prompt}, tasks(), journal=journal, progress=False)
        return some.score("asked", "texts")

    first = scored(Prompted("say: "))
    lines = (tmp_path / "j" / "items-0.jsonl").read_text().count('"key"')
    assert scored(Prompted("say: ")) == first
    assert (tmp_path / "j" / "items-0.jsonl").read_text().count('"key"') == lines
    assert scored(Prompted("tell: ")) == scored(Prompted("tell: "), None) != first


def test_identity_and_fingerprint_know_it(lm):
    plain, marks = lm.identity, set()
    for one in (Prompted("say: "), Prompted("tell: ")):
        with one.apply(lm.model):
            marks.add(lm.identity)
    assert len({plain, *marks}) == 3
    assert lm.identity == plain
    with Prompted("say: ").apply(lm.model), pytest.raises(SettingError, match="cannot be mined"):
        lirefs.mine(lm, [("a", "a text " * 20)], progress=False, prefix_tokens=8, suffix_tokens=4)


@dataclass(frozen=True, repr=False)
class OwnWay(ItemTask):
    """Asks the model itself."""

    group: str = "reasoning"
    metric: str = "accuracy"
    chance: float = 0.0

    def run(self, lm, advance):
        lm.model(**lm.pad([[5, 6]]))
        return [ItemResult(str(one), {"accuracy": 1.0}) for one in self.items]


def test_a_task_that_it_does_not_reach_is_refused(lm):
    own = OwnWay("own", ["a"])
    compare(lm, {}, [own], resamples=2, progress=False)
    with pytest.raises(TaskError, match="own: this task does not ask the model by the functions"):
        compare(lm, {"asked": Prompted("say: ")}, [own], resamples=2, progress=False)


def test_an_item_that_no_longer_fits_is_named_before_anything_runs():
    small = lirefs.wrap(fresh_model("gpt2", n_positions=16), tiny_tokenizer())
    task = lirefs.Perplexity("texts", [("long", "a text of 15 .")])
    compare(small, {}, [task], resamples=2, progress=False)
    with pytest.raises(TaskError, match="item 'long' needs 19 positions"):
        compare(small, {"asked": Prompted("say ")}, [task], resamples=2, progress=False)


class Spy:
    """An engine that answers with the model itself, and remembers what it was asked."""

    def __init__(self, lm):
        self.lm, self.asked, self.changes = lm, [], []

    def check(self, lm):
        pass

    def describe(self):
        return {"runtime": "spy"}

    @contextlib.contextmanager
    def steered(self, intervention):
        self.changes.append(intervention.describe())
        with intervention.apply(self.lm.model):
            yield

    def greedy(self, prompts, max_new_tokens, ends, until):
        self.asked += prompts
        return [[5] for _ in prompts]


def test_on_an_engine_it_is_put_before_what_the_engine_is_asked(lm):
    spy, task, before = Spy(lm), tasks()[0], ids(lm, "say: ")
    variants = {"asked": Prompted("say: "), "both": Prompted("say: ") + turned(lm)}
    compare(lm, variants, [task], resamples=2, progress=False, engine=spy)
    plain, asked, both = (spy.asked[start : start + 2] for start in (0, 2, 4))
    assert asked == both == [[0, *before, *row[1:]] for row in plain]
    assert [one["kind"] for one in spy.changes] == ["steer", "steer"]  # tried, and run


def turned(lm):
    return Steer(Direction(torch.ones(lm.width), 1), "add", 1.0)


@pytest.fixture
def chat():
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = CHATML
    return lirefs.wrap(fresh_model("llama"), tokenizer, name="chat")


def test_a_message_of_the_system_takes_the_place_of_the_usual_one(chat):
    talk = chat.chat([{"role": "system", "content": "read"}, {"role": "user", "content": "hi"}])
    spy = Spy(chat)
    items = [("chat", chat.chat("hi"), "x"), ("plain", "hi", "x")]
    task = lirefs.ShortAnswer("answers", items)
    asked = {"asked": Prompted(system="read")}
    found = compare(chat, asked, [task], resamples=2, progress=False, engine=spy)
    assert set(map(chat.tokenizer.decode, spy.asked[2:])) == {f"<s>{talk}", "<s>|system~read|hi"}
    described = found.provenance["interventions"]["asked"]
    assert described == {"kind": "prompted", "system": "read"}


def test_every_token_of_a_text_stays_even_if_it_is_a_chat(chat):
    (text,) = chat.encode([chat.chat("hi")])
    with Prompted(system="read").apply(chat.model):
        (nll,) = token_nlls(chat, [text])
    assert len(nll) == len(text) - 1


@pytest.mark.parametrize("template", [None, "{{ raise_exception('no system') }}", "{{ 'hi' }}"])
def test_a_template_without_a_place_for_the_system_is_named(chat, template):
    chat.tokenizer.chat_template = template
    with pytest.raises(InterventionError, match=r"chat template does not write .* give Prompted a"):
        compare(chat, {"asked": Prompted(system="read")}, tasks(), resamples=2, progress=False)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "needs either a prefix or a system message"),
        ({"prefix": "a", "system": "b"}, "needs either a prefix or a system message"),
        ({"prefix": ""}, "prefix is empty"),
        ({"system": ""}, "system is empty"),
        ({"prefix": 3}, "prefix must be"),
        ({"system": ["a"]}, "system must be"),
    ],
)
def test_wrong_arguments_are_named(given, message):
    with pytest.raises(InterventionError, match=message):
        Prompted(**given)


def test_it_shows_itself(lm):
    assert repr(Prompted("say: ")) == "Prompted('say: ')"
    assert repr(Prompted("a" * 99)) == f"Prompted('{'a' * 60}…')"
    assert repr(Prompted(system="read")) == "Prompted(system='read')"
    assert "Prompted('say: ')" in repr(Prompted("say: ") + turned(lm))
