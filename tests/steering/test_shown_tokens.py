"""The picture of a prompt: which tokens are read and steered, compared with what steering does."""

import pytest
import torch
from steering_tools import direction, split, touched
from tiny import fresh_model, tiny_tokenizer

import kfac
from lirefs import Gate, Question, Questions, Schedule, Steer, fit, show_tokens, wrap
from lirefs.directions import Direction
from lirefs.errors import InterventionError, LirefsError, ScopeError, SettingError
from lirefs.steering import ShownTokens, scope

PROMPT = "how is it"


@pytest.fixture(scope="module")
def lm():
    return wrap(fresh_model("llama"), tiny_tokenizer(), name="tiny")


def only(found):
    (row,) = found.strengths.values()
    return row


STEERS = {
    "plain": lambda: Steer(direction(), "add", 0.5),
    "prompt": lambda: Steer(direction(), "add", 0.5, scope="prompt"),
    "last": lambda: Steer(direction(), "amplify", 2.0, scope="last_prompt_token"),
    "generated": lambda: Steer(direction(), "add", -0.5, scope="generated"),
    "span": lambda: Steer(
        direction(), "add", 0.5, scope=scope.spans(tiny_tokenizer(), [PROMPT], [[(4, 6)]])
    ),
    "schedule": lambda: Steer(direction(), "add", Schedule([0.5, 0.0, 2.0])),
    "row strength": lambda: Steer(direction(), "add", [0.25]),
    "token gate": lambda: Steer(direction(), "add", 0.5, gate=Gate(direction(seed=5), 0.0)),
    "row gate": lambda: Steer(
        direction(), "add", 0.5, gate=Gate(direction(seed=5), -99.0, per="row")
    ),
}


@pytest.mark.parametrize("name", STEERS)
@pytest.mark.parametrize("new", [0, 4])
def test_what_is_drawn_as_steered_is_what_changes(lm, name, new):
    steer = STEERS[name]()
    found = show_tokens(lm, PROMPT, steer, max_new_tokens=new)
    assert found.read == len(lm.encode([PROMPT])[0]) - 1
    assert found.read + (new > 0) < len(found.tokens) <= found.read + 1 + new
    with steer.apply(lm.model), touched(lm, 1) as marks:
        lm.generate(PROMPT, max_new_tokens=max(new, 1), eos_token_id=-1)
    changed = [one for rows in marks for one in rows[0]]
    drawn = [int(one != 0) for one in only(found)][: len(changed)]
    assert drawn == changed[: len(drawn)]


def test_strengths_are_those_of_the_steering(lm):
    assert set(only(show_tokens(lm, PROMPT, STEERS["prompt"]()))) == {0.5}
    found = show_tokens(lm, PROMPT, STEERS["schedule"](), max_new_tokens=4)
    assert only(found)[-4:] == (0.5, 0.0, 2.0, 0.0)
    assert only(show_tokens(lm, PROMPT, STEERS["row strength"]()))[0] == 0.25
    ablated = show_tokens(lm, PROMPT, Steer(direction(), "ablate"))
    assert set(only(ablated)) == {1.0}
    assert set(only(show_tokens(lm, PROMPT, Steer(direction(), "add", 0.0)))) == {0.0}


def test_layers_of_different_strengths_and_compositions(lm):
    by_layer = Steer(direction(), "add", {1: 0.5, 2: 0.5, 3: -2.0}, layers=[1, 2, 3])
    found = show_tokens(lm, PROMPT, by_layer)
    assert list(found.strengths) == [
        "add, layers 1, 2 at resid_pre, scope all",
        "add, layer 3 at resid_pre, scope all",
    ]
    assert set(found.strongest) == {-2.0}
    both = Steer(direction(), "add", 1.0, scope="last_prompt_token") + Steer(direction(2), "clamp")
    found = show_tokens(lm, PROMPT, both)
    assert [name[:6] for name in found.strengths] == ["1. add", "2. cla"]
    factors = kfac.collect(lm, ["a text to read"] * 2, layers=[2], progress=False)
    edited = kfac.CurvatureEdit(factors, keep=0.5) + Steer(direction(), "add", 1.0)
    assert set(only(show_tokens(lm, PROMPT, edited))) == {1.0}


def test_nothing_stays_on_the_model(lm):
    before = lm.fingerprint
    for name in ("span", "row gate"):
        show_tokens(lm, PROMPT, STEERS[name]())
    with pytest.raises(ScopeError):
        show_tokens(lm, "x", Steer(direction(), "add", scope=scope.mask([[True] * 9])))
    assert lm.fingerprint == before
    assert not any(module._forward_hooks for module in lm.model.modules())
    assert not any(module._forward_pre_hooks for module in lm.model.modules())


def test_the_text_names_what_is_read_and_steered(lm):
    text = str(show_tokens(lm, "a b", Steer(direction(), "add", 0.5, scope="last_prompt_token")))
    assert text == (
        "4 tokens; >token 3< is read: 'b'\n"
        "add, layer 1 at resid_pre, scope last_prompt_token: [1 of 4 tokens], strength 0.5\n"
        "<s> a · >[b]<"
    )
    odd = ShownTokens(("\n", "a\tb", "", "\x07", "\u00e9"), 0, {})
    assert str(odd).splitlines()[1] == ">↵< a→b '' \\x07 \u00e9"
    found = show_tokens(lm, "ab", STEERS["schedule"](), max_new_tokens=3)
    assert "[2 of 6 tokens], strength 0.5 to 2" in str(found)
    assert " 0.5]" in str(found)
    assert " 2]" in str(found)
    assert "no token is steered" in str(show_tokens(lm, "ab", STEERS["schedule"]()))


def test_the_text_wraps_and_has_at_most_12_lines(lm):
    many = sum((Steer(direction(), "add", 0.1 * n) for n in range(1, 9)), start=STEERS["plain"]())
    for steer in (None, STEERS["plain"](), many):
        found = show_tokens(lm, "word and " * 13, steer)
        assert repr(found) == str(found)
        lines = str(found).splitlines()
        assert len(lines) <= 12
        assert max(map(len, lines)) <= 88
        assert ">" in lines[-1]
    long = show_tokens(lm, "wordy" * 24, many)
    assert len(str(long).splitlines()) <= 12
    assert "and 5 more" in str(long)


def test_the_drawing_escapes_and_colours(lm):
    plus = Steer(direction(), "add", 1.0, scope=scope.mask([False, True, False, False]))
    minus = Steer(direction(), "add", -0.5, scope=scope.mask([False, False, True]))
    drawn = show_tokens(lm, "<b>", plus + minus)._repr_html_()
    assert "&lt;" in drawn
    assert "<b>" not in drawn
    assert drawn.count("rgba(0,114,178,0.60)") == 1
    assert drawn.count("rgba(213,94,0,0.38)") == 1
    assert drawn.count("outline") == 1
    assert "token 3; is read; " in drawn
    assert show_tokens(lm, "a" * 90)._repr_html_().count("<span") == 91


def test_a_question_is_read_as_fit_reads_it(lm):
    found = show_tokens(lm, Question("Why?", "memory", "q"))
    assert "".join(found.tokens) == "<s>Q: Why?A: "  # this tokenizer has no line end
    probe = fit(lm, split(), layers=[1], shuffles=1, progress=False)
    read = found.tokens[found.read]
    assert probe.directions.provenance["tokens_read"].keys() == {read}
    pair = Questions.from_pairs([("yes", "no")])
    assert show_tokens(lm, pair[0]).tokens == ("<s>", "y", "e", "s")


@pytest.mark.parametrize(
    ("prompt", "steer", "error"),
    [
        (3, None, SettingError),
        ("", None, LirefsError),
        ("a", "add", InterventionError),
        ("a", Steer(Direction(torch.ones(7), 1), "add"), InterventionError),
    ],
)
def test_wrong_arguments(lm, prompt, steer, error):
    if prompt == "":
        lm = wrap(lm.model, tiny_tokenizer(bos=False))
    with pytest.raises(error):
        show_tokens(lm, prompt, steer)
    with pytest.raises(SettingError):
        show_tokens(lm, "a", max_new_tokens=-1)
