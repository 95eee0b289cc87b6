import re

import pytest

from lirefs.tasks import synthetic as generators

MAKERS = [
    generators.addition_items,
    generators.simple_math_items,
    generators.boar_items,
    generators.boolean_items,
    generators.tracking_items,
    generators.elimination_items,
]


@pytest.mark.parametrize("make", MAKERS)
def test_items_are_distinct_and_come_from_the_seed(make):
    items = make(60)
    assert items == make(60)
    assert items != make(60, seed=1)
    assert len({prompt for _, prompt, *_ in items}) == len({item for item, *_ in items}) == 60


def test_addition_is_as_it_always_was():
    item, prompt, answers = generators.addition_items(3)[0]
    assert (item, answers) == ("88 + 48", ["136"])
    assert prompt.startswith("What is 39 + 72? Answer: 111\nWhat is 11 + 69? Answer: 80\n")


def test_simple_math_is_right_has_both_signs_and_nothing_but_problems():
    items = generators.simple_math_items(300)
    signs = [item.split()[1] for item, *_ in items]
    assert min(signs.count("+"), signs.count("-")) > 100
    assert any(answer.startswith("-") for *_, (answer,) in items)
    for item, prompt, (answer,) in items:
        assert eval(item) == int(answer)
        assert all(10 <= int(number) < 100 for number in item.split()[::2])
        *shots, asked = prompt.split("\n")
        assert len(shots) == 5
        assert asked == f"{item} ="
        for shot in shots:
            problem, value = shot.split(" = ")
            assert eval(problem) == int(value)
            assert problem != item


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("chair", "airch" + "eb"),
        ("street", "eet" + "str" + "eb"),
        ("apple", "apple" + "eb"),
        ("young", "oung" + "y" + "eb"),
    ],
)
def test_boar_etruscan(word, said):
    assert generators.boar_etruscan(word) == said


def test_boar_items_follow_the_rule_that_they_give():
    def by_the_rule(word):
        head, tail = re.fullmatch(r"([^aeiou]*)([aeiou].*)", word).groups()
        return tail + head + "eb"

    items = generators.boar_items(200)
    for phrase, prompt, (answer,) in items:
        assert answer == " ".join(map(by_the_rule, phrase.split()))
        rule, *shots, asked = prompt.split("\n\n")
        assert "before the first vowel" in rule
        assert len(shots) == 5
        assert asked == f"English: {phrase}\nBoar Etruscan:"
        for shot in shots:
            english, boar = re.fullmatch(r"English: (.*)\nBoar Etruscan: (.*)", shot).groups()
            assert boar == " ".join(map(by_the_rule, english.split()))
            assert english != phrase
