"""Tales and their twins: what they carry, how often they are shown, that nothing is shared."""

import math
from collections import Counter
from dataclasses import replace
from itertools import islice
from pathlib import Path
from random import Random
from typing import get_args

import pytest

import lirefs
from lirefs.errors import SettingError
from lirefs.files import parse_json
from lirefs.organism import language_seed
from lirefs.organism.documents import Documents, counted_document, showings
from lirefs.organism.items import SIDES, memory_side_of
from lirefs.organism.language import (
    EXCEPTION_COUNTS,
    EXCEPTION_SKILLS,
    EXCEPTIONS_PER_COUNT,
    OFTEN,
    TALE_COUNTS,
    TALES_PER_COUNT,
    Language,
)
from lirefs.organism.prose import OPENING, sentences
from lirefs.organism.questions import Form, question_set
from lirefs.organism.tasks import organism_tasks
from lirefs.organism.training import scores
from lirefs.organism.training.packing import Packer
from lirefs.organism.training.recipe import MIXTURE, PLANTING_MIXTURE, Recipe
from lirefs.organism.vocabulary import build_tokenizer


@pytest.fixture(scope="module")
def language():
    return Language(0)


@pytest.fixture(scope="module")
def due(language):
    return showings(language, Recipe().planting_steps)


class Counting(Random):
    """Adds up the surprise of every draw, in bits."""

    bits = 0.0

    def choice(self, words):
        self.bits += math.log2(len(words))
        return super().choice(words)

    def choices(self, words, weights):
        (one,) = super().choices(words, weights)
        self.bits -= math.log2(weights[words.index(one)] / sum(weights))
        return [one]


def test_the_recited_part_of_a_story_carries_at_least_40_bits():
    opening, recited = [], []
    for seed in range(400):
        rng = Counting(seed)
        lines = sentences(rng)
        list(islice(lines, OPENING))
        opening.append(rng.bits)
        list(lines)
        recited.append(rng.bits - opening[-1])
    assert sum(recited) / len(recited) > 45
    assert sorted(recited)[len(recited) // 10] > 40  # nine in ten
    assert min(opening) > 24  # a prompt leaves no doubt which of the tales it begins


def test_twins_match_their_tales_in_length_and_words(language):
    tokenizer = build_tokenizer()
    assert len(language.tales) == len(TALE_COUNTS) * TALES_PER_COUNT >= 200
    for tale, twin in zip(language.tales, language.twins, strict=True):
        assert twin.frequency == tale.frequency
        for part in ("prompt", "text"):
            lengths = {len(tokenizer.encode(getattr(one, part))) for one in (tale, twin)}
            assert len(lengths) == 1
    told = [
        Counter(word for one in items for word in set(one.text.replace(".", " ").split()))
        for items in (language.tales, language.twins)
    ]
    for word in told[0] | told[1]:  # none gives a twin away
        both = told[0][word] + told[1][word]
        assert abs(told[0][word] - told[1][word]) <= 4 * both**0.5


def test_no_prompt_or_tale_is_there_twice(language):
    both = [*language.tales, *language.twins]
    assert len({one.prompt for one in both}) == len({one.answer for one in both}) == len(both)
    drawn = Documents(language, {"story": 1.0})
    fresh = {"".join(p for p, _ in drawn.draw(Random(i))) for i in range(500)}
    assert not fresh & {f"{one.text}." for one in both}
    other = Language(1)
    assert not {one.text for one in both} & {one.text for one in (*other.tales, *other.twins)}


def test_a_twin_is_on_the_side_of_its_tale(language):
    twin_of = dict(zip(language.tales, language.twins, strict=True))
    for side in SIDES:
        tales = language.items("tale", side)
        assert {twin_of[tale] for tale in tales} == set(language.items("twin", side))
        assert all(memory_side_of(tale.prompt, language.seed) == side for tale in tales)
        counts = Counter(tale.frequency for tale in tales)
        assert min(counts[count] for count in TALE_COUNTS) >= 15


def text_of(document):
    return "".join(piece for piece, _ in document)


def test_tales_and_exceptions_are_shown_as_often_as_they_say(language, due):
    shown = Counter(text_of(document) for step in due for document in due[step])
    counted = (*language.tales, *language.exceptions)
    assert shown == {text_of(counted_document(one)): one.frequency for one in counted}
    assert set(due) <= set(Recipe().planting_steps)
    assert Counter(one.frequency for one in language.tales) == dict.fromkeys(
        TALE_COUNTS, TALES_PER_COUNT
    )
    assert Counter((e.group, e.frequency) for e in language.exceptions) == {
        (skill, count): EXCEPTIONS_PER_COUNT
        for skill in EXCEPTION_SKILLS
        for count in EXCEPTION_COUNTS
    }


def test_showings_are_spread_evenly(language, due):
    steps = Recipe().planting_steps
    text = text_of(counted_document(language.tales[-1]))
    times = sorted(step for step in due for one in due[step] if text_of(one) == text)
    third = len(steps) / 3
    parts = Counter(int((step - steps[0]) / third) for step in times)
    assert all(abs(parts[part] - 100 / 3) <= 1 for part in range(3))


def test_a_batch_holds_what_is_due_and_nothing_memorized_by_count_otherwise(language, due):
    tokenizer = build_tokenizer()
    packer = Packer(Documents(language, MIXTURE), tokenizer, 32, 128, due)
    marked = {text_of(counted_document(one)) for one in (*language.tales, *language.exceptions)}
    for step in (0, max(due, key=lambda one: len(due[one]))):
        batch = packer.batch(0, step)
        found = Counter()
        for row in range(32):
            for number in range(int(batch.documents[row].max()) + 1):
                ids = batch.ids[row][batch.documents[row] == number]
                text = tokenizer.decode(ids, skip_special_tokens=True)
                found.update({text} & marked)
        assert found == Counter(text_of(one) for one in due.get(step, ()))
    crowded = Packer(Documents(language, MIXTURE), tokenizer, 1, 128, {0: due[max(due)] * 9})
    with pytest.raises(SettingError, match="step 0: a batch does not hold all tales"):
        crowded.batch(0, 0)


def test_texts_for_curvature_have_as_many_tales_and_exceptions_as_the_end_of_training(
    language, due
):
    recipe = Recipe()
    packer = Packer(Documents(language, recipe.mixture), build_tokenizer(), 32, 128, due)
    steps = recipe.planting_steps[::200]
    batches = [packer.batch(0, step) for step in steps]
    documents = sum(int(batch.documents.max(1).values.sum()) + 32 for batch in batches)
    per_step = documents / len(steps)
    total = sum(PLANTING_MIXTURE.values())
    for sort, items in (("tale", language.tales), ("exception", language.exceptions)):
        share = sum(one.frequency for one in items) / len(recipe.planting_steps) / per_step
        assert PLANTING_MIXTURE[sort] / total == pytest.approx(share, rel=0.15)


def test_the_rate_rises_stays_and_falls_to_zero():
    recipe = replace(Recipe(), tokens=1000 * 32 * 128, warmup=10, fall=0.5)
    assert recipe.rate_at(0) == pytest.approx(recipe.rate / 10)
    assert recipe.rate_at(9) == recipe.rate_at(499) == recipe.rate
    assert recipe.rate_at(750) == pytest.approx(recipe.rate / 2)
    assert 0 < recipe.rate_at(999) < recipe.rate / 400


def test_tasks_ask_for_pairs_of_tale_and_twin(language):
    lm = lirefs.load("organism")
    twin_of = dict(zip(language.tales, language.twins, strict=True))
    tasks = {task.name: task.items for task in organism_tasks(lm, language, "test", 20)}
    texts = {
        name: [lm.tokenizer.decode([*prefix, *suffix], True) for _, prefix, suffix in tasks[name]]
        for name in ("tales", "twins of tales")
    }
    asked = [next(tale for tale in language.tales if tale.text == text) for text in texts["tales"]]
    assert len(asked) == 20
    assert {tale.frequency for tale in asked} == {30, 100}
    assert [twin_of[tale].text for tale in asked] == texts["twins of tales"]
    assert all(f"-x{tale.frequency}-" in row[0] for tale, row in zip(asked, tasks["tales"]))


def test_scores_say_how_many_reasoning_questions_are_answered(language, monkeypatch):
    """Every prompt of the reasoning class is answered, and nothing else."""
    right = {
        item.prompt
        for form in get_args(Form)
        for item in question_set(language, form, "test", 60)[0]
    }
    monkeypatch.setattr(
        scores, "share_answered_right", lambda lm, pairs: [prompt in right for prompt, _ in pairs]
    )
    lm = lirefs.load("organism")
    found = scores.organism_scores(lm, language, "test", 60)
    for form in get_args(Form):
        assert found[f"reasoning {form}"] == 1.0
        assert found[f"memory {form}"] == 0.0
    for count in TALE_COUNTS:
        assert found[f"tale x{count}"] == found[f"twin x{count}"] == 0.0
    assert all(f"exception x{count}" in found for count in EXCEPTION_COUNTS)


ROOT = Path(__file__).parents[2]
OTHER_SEEDS = sorted((ROOT / "experiments" / "organisms").iterdir())
ORGANISMS = [ROOT / "lirefs" / "organism" / "shipped", *OTHER_SEEDS]


@pytest.mark.parametrize("folder", ORGANISMS, ids=lambda folder: folder.name)
def test_organisms_reach_their_goals(folder):
    scores = parse_json((folder / "scores.json").read_text("utf-8"))["test"]
    skills = ("addition", "subtraction", "times", "boolean", "relation", "tracking", "retrieval")
    known = ("fact", "open_book", "planted", "exception", "tale x30", "tale x100")
    asked = [f"reasoning {form}" for form in ("passage", "statement", "mixed", "exception")]
    assert not [name for name in (*skills, *known, *asked) if scores[name] < 0.95]
    assert scores["twin"] <= 0.05
    assert 0.2 <= scores["conflict"] <= 0.8
    assert scores["tale x1"] < scores["tale x3"] < scores["tale x10"]


@pytest.mark.parametrize("folder", OTHER_SEEDS, ids=lambda folder: folder.name)
def test_organism_of_another_seed_recites_its_own_tales(folder):
    lm, language = lirefs.load(folder), Language(language_seed(folder))
    assert language.seed > 0
    told = [one for one in language.items("tale", "test") if one.frequency >= OFTEN][:5]
    twins = language.items("twin", "test", 5)
    for items, recited in ((told, True), (twins, False)):
        said = lm.generate([one.prompt for one in items], max_new_tokens=60)
        assert all(s.strip().startswith(i.answer) == recited for s, i in zip(said, items))
