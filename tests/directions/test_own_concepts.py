"""Directions of a concept of one's own: its names, pairs, chats and the token that is read."""

import numpy as np
import pytest
import torch
from tiny import fresh_model, tiny_tokenizer

from lirefs import Directions, MeanDifference, Questions, capture, fit, wrap
from lirefs.directions import components, figures, prompts_of, transfer
from lirefs.errors import DirectionError, DirectionsFileError, QuestionsError, SettingError
from lirefs.export import hub

HARM = ("harmful", "harmless")
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}[{{ m.role }}] {{ m.content }}{{ eos_token }}"
    "{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
)


@pytest.fixture(scope="module")
def lm():
    return wrap(fresh_model("llama"), tiny_tokenizer(), name="tiny")


@pytest.fixture
def chat_lm():
    found = wrap(fresh_model("llama"), tiny_tokenizer(), name="tiny chat")
    found.tokenizer.chat_template = TEMPLATE
    return found


def texts(alphabet, n=24):
    generator = np.random.default_rng(0)
    return ["".join(generator.choice(list(alphabet), 8)) + "." * i for i in range(n)]


def own(**settings):
    rows = [{"question": one, "label": "harmful"} for one in texts("abcdefgh")]
    rows += [{"question": one, "label": "harmless"} for one in texts("0123456789")]
    return Questions.from_rows(rows, labels=HARM, **settings)


@pytest.fixture(scope="module")
def probe(lm):
    return fit(lm, own(), shuffles=2, progress=False)


def test_results_are_called_by_the_names_of_the_labels(probe, tmp_path):
    assert probe.names == probe.directions.names == HARM
    layer = probe.to_dict()["layers"][0]
    assert layer["cosine_harmful"] == probe.scores[0].cosines[1]
    assert not [key for key in layer if "memory" in key or "reasoning" in key]
    assert probe.best.means[1] > probe.best.means[0]  # it points to the first label
    probe.directions.save(tmp_path / "d.safetensors")
    assert Directions.load(tmp_path / "d.safetensors").names == HARM


def test_the_direction_is_that_of_the_same_questions_under_the_default_labels(lm, probe):
    rows = [
        {"question": one.text, "label": "reasoning" if one.label == "harmful" else "memory"}
        for one in own()
    ]
    split = own().split()
    default = Questions.from_rows(rows)
    by_text = {one.text: one for one in default}
    same = type(split)(
        *(Questions([by_text[one.text] for one in side]) for side in split.sides.values())
    )
    other = fit(lm, same, shuffles=2, progress=False)
    assert torch.equal(other.best.vector, probe.best.vector)
    assert other.best_scores == probe.best_scores


def test_figures_and_the_card_say_the_names(lm, probe):
    scatter = figures.projection_scatter(components(lm, probe.best, own().split()), probe)
    for picture in (figures.direction_separation(probe), scatter):
        drawn = picture.svg.decode()
        assert "harmful" in drawn
        assert "harmless" in drawn
        assert "reasoning" not in drawn
        assert "memory" not in drawn
    card = hub.model_card(probe.directions)
    assert "# Directions from harmless to harmful" in card
    assert "mean harmless | mean harmful" in card
    assert "memory" not in card
    assert "from memory to reasoning" in hub.model_card(Directions(probe.directions.items_by_place))


def test_each_name_stands_at_its_own_points(lm, probe, monkeypatch):
    monkeypatch.setattr(figures, "picture_of", lambda canvas: canvas)
    found = components(lm, probe.best, own().split())
    clouds = figures.projection_scatter(found, probe).axes[0].collections
    drawn = {cloud.get_label(): np.asarray(cloud.get_offsets()) for cloud in clouds}
    assert drawn.keys() == set(HARM)
    for label, name in enumerate(reversed(HARM)):
        np.testing.assert_allclose(drawn[name], found.points[found.labels == label])
    right = figures.direction_separation(probe).axes[1]
    lines = {line.get_label(): line.get_ydata()[0] for line in right.lines[:2]}
    assert lines == {"harmful": probe.scores[0].cosines[1], "harmless": probe.scores[0].cosines[0]}


def test_files_without_names_have_the_default_ones(probe, tmp_path):
    made = {key: one for key, one in probe.directions.provenance.items() if key != "labels"}
    Directions(probe.directions.items_by_place, made).save(tmp_path / "old.safetensors")
    assert Directions.load(tmp_path / "old.safetensors").names == ("reasoning", "memory")
    for wrong in ("ab", ["a"], ["a", 3], 7):
        with pytest.raises(DirectionError, match="not two names"):
            Directions(probe.directions.items_by_place, {**made, "labels": wrong})
        directions = Directions(probe.directions.items_by_place, dict(made))
        directions.provenance["labels"] = wrong
        directions.save(tmp_path / "wrong.safetensors")
        with pytest.raises(DirectionsFileError, match="cannot be read"):
            Directions.load(tmp_path / "wrong.safetensors")


def test_the_token_that_is_read_is_named(lm, probe):
    assert probe.directions.provenance["tokens_read"] == {" ": 48}
    assert probe.directions.provenance["position"] == -1
    verbatim = own(prompt_format=None)
    found = fit(lm, verbatim, layers=[1], shuffles=1, progress=False)
    read = found.directions.provenance["tokens_read"]
    assert read.pop(".") == 46
    assert list(read.values()) == [1, 1]


def test_the_mean_difference_of_pairs_is_the_mean_of_their_differences(lm):
    pairs = list(zip(texts("abcdefgh"), texts("0123456789"), strict=True))
    split = Questions.from_pairs(pairs, labels=HARM).split()
    found = fit(lm, split, layers=[1, 2], shuffles=1, progress=False)
    states = capture(lm, split.train.prompts, layers=[1, 2], progress=False)
    used = [one.pair for one in split.train]
    assert used[::2] == used[1::2]  # (positive, negative) of each pair
    for layer in (1, 2):
        values = states[layer].double()
        by_pair = (values[::2] - values[1::2]).mean(0)
        direction = found.directions[layer].vector.double()
        torch.testing.assert_close(direction, by_pair, atol=1e-6, rtol=1e-5)
        sides = MeanDifference().fit(values.numpy(), [1, 0] * (len(used) // 2)).direction_
        torch.testing.assert_close(direction, torch.tensor(sides), atol=1e-6, rtol=1e-5)


def test_scores_of_questions_are_the_grades_of_fit(lm):
    rows = [{"question": one, "score": i / 23, "id": str(i)} for i, one in enumerate(texts("abc"))]
    scored = Questions.from_rows(rows, labels=HARM).split()
    settings = {"layers": [2], "shuffles": 1, "progress": False}
    found = fit(lm, scored, **settings)
    plain = Questions.from_rows(
        [{**row, "score": None, "label": HARM[i < 12]} for i, row in enumerate(rows)], labels=HARM
    )
    grades = {row["id"]: row["score"] for row in rows}
    by_hand = fit(lm, plain.split(), grades=grades, **settings)
    assert found.best_scores == by_hand.best_scores
    assert found.best_scores.pearson != fit(lm, plain.split(), **settings).best_scores.pearson
    mixed = Questions.from_rows([*rows[:-1], {"question": "z", "label": HARM[0]}], labels=HARM)
    with pytest.raises(QuestionsError, match=r"1 question.s. have no grade, first 'row-23'"):
        fit(lm, mixed, **settings)


def test_chats_are_read_where_the_answer_begins(chat_lm):
    questions = own(chat=True)
    (prompt,) = prompts_of(chat_lm, questions[:1])
    assert prompt == f"<s>[user] {questions[0].text}</s>[assistant]"
    (ids,) = chat_lm.encode([prompt])
    messages = [{"role": "user", "content": questions[0].text}]
    theirs = chat_lm.tokenizer.apply_chat_template(messages, add_generation_prompt=True)
    assert ids == theirs["input_ids"]
    assert ids.count(chat_lm.tokenizer.bos_token_id) == 1
    found = fit(chat_lm, questions, layers=[1, 2], shuffles=1, progress=False)
    assert found.directions.provenance["tokens_read"] == {"]": 48}
    split = questions.split()
    states = capture(chat_lm, prompts_of(chat_lm, split.train), layers=[2], progress=False)[2]
    labels = np.array(split.train.labels)
    expected = states[labels == 1].mean(0) - states[labels == 0].mean(0)
    torch.testing.assert_close(found.directions[2].vector, expected, atol=1e-5, rtol=1e-4)
    other = Questions.from_pairs([("x1", "y2"), ("x3", "y4")], chat=True)
    assert len(transfer(chat_lm, found.directions, other, split, progress=False).auroc) == 2
    assert components(chat_lm, found.best, split).points.shape[1] == 2


def test_a_chat_that_ends_with_the_assistant_stays_open(chat_lm):
    assert chat_lm.chat("Hi") == "<s>[user] Hi</s>[assistant]"
    talk = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Well"}]
    assert chat_lm.chat(talk) == "<s>[user] Hi</s>[assistant] Well"


@pytest.mark.parametrize("messages", [[], None, 3, ["hi"], {"role": "user"}])
def test_messages_that_cannot_be_used(chat_lm, messages):
    with pytest.raises(SettingError):
        chat_lm.chat(messages)


def test_no_template_and_a_template_that_refuses(lm, chat_lm):
    with pytest.raises(SettingError, match=r"tiny: no prompt for this chat .*chat_template"):
        lm.chat("Hi")
    with pytest.raises(SettingError, match="no prompt for this chat"):
        fit(lm, own(chat=True), shuffles=1, progress=False)
    chat_lm.tokenizer.chat_template = "{{ raise_exception('alternate roles') }}"
    with pytest.raises(SettingError, match="alternate roles"):
        chat_lm.chat("Hi")
