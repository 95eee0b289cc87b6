"""Properties of the harness's numbers and of how it reads answers, on random examples."""

import math
import re
from fractions import Fraction
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from experiments.arithmetic.traces import compare_traces, read_steps
from lirefs.comparison.sweeps import pareto_front
from lirefs.tasks import mining
from lirefs.tasks import synthetic as generators
from lirefs.tasks.answers import final_number, judge, number_at
from lirefs.tasks.ndcg import ndcg
from lirefs.tasks.recitation import levenshtein, recitation_scores
from lirefs.tasks.task import progress_in_items

few = settings(max_examples=60, deadline=None, derandomize=True)
many = settings(max_examples=300, deadline=None, derandomize=True)

# Answers

amounts = st.integers(-(10**9), 10**9).flatmap(
    lambda n: st.sampled_from([n, n / 10, n / 100, n / 1000])
)
NUMBER_LIKE = "0123456789-+.,$€/*x:=%() \u2212\u2013\n'\"eE\u0663"
garbage = st.one_of(
    st.text(max_size=40),
    st.text(NUMBER_LIKE, max_size=16),
    st.lists(
        st.sampled_from(
            ["the answer is ", "Answer is: ", "12", "3,5", "1,000", "-", " ", ".", "**", "$", "x"]
        ),
        max_size=8,
    ).map("".join),
)


def numbers_in(text):
    """Every reading of a run of digits as a number: as written, or by thousands."""
    found = set()
    for match in re.finditer(r"\d+(?:\.\d+)?", text):
        found.add(float(match[0]))
    for match in re.finditer(r"(?<![\d,])\d{1,3}(?:,\d{3})+(?:\.\d+)?", text):
        found.add(float(match[0].replace(",", "")))
    return found


@given(amounts)
@many
def test_an_answer_that_we_write_is_read_as_itself(value):
    written = [f"{value}", f"{value:,}", f"{value}".replace("-", "\u2212"), f"{value} km"]
    written += [f"-${abs(value):,}" if value < 0 else f"${value:,}", f"{value}.\n"]
    if float(value).is_integer() or "e" not in f"{value}":
        for text in written:
            assert number_at(text) == value, text
            assert final_number(f"So it is. The answer is {text}") == value
            assert judge(f"The answer is {text}", [f"{value:,}"], "worked") == (True, True)
            assert judge(f"The answer is {text}", [f"{value + 1:,}"], "worked") == (True, False)
        assert judge(f"{value:,}", [f"{value}"], "number") == (True, True)


@given(garbage, garbage)
@example("12,,3", "")  # was read as 123
@example("3,50", "")  # was read as 350
@example("9" * 400, "")  # was read as infinity
@example("no idea", "unknown")  # was unparsable and yet right: None is None
@example("...", "")  # was right without any words
@example("1", "1,000")  # an answer with commas was not a number
@many
def test_garbage_is_never_read_as_a_number_that_is_not_in_it(text, answer):
    for value in (number_at(text), final_number(text)):
        assert value is None or abs(value) in numbers_in(text)
    for kind in ("text", "words", "number", "worked"):
        parsed, right = judge(text, [answer], kind)
        assert parsed or not right
        if kind in ("number", "worked") and right:
            assert numbers_in(text) & numbers_in(answer)
    for kind in ("text", "words"):
        parsed, right = judge(text, [text], kind)
        assert right == parsed


# Arithmetic


def expressions(depth=3):
    number = st.integers(0, 99).map(lambda n: (str(n), Fraction(n)))
    decimals = st.integers(0, 999).map(lambda n: (f"{n / 10:.1f}", Fraction(n, 10)))

    def grow(inner):
        return st.tuples(inner, st.sampled_from("+-*/"), inner).map(
            lambda t: (f"({t[0][0]} {t[1]} {t[2][0]})", apply(t[1], t[0][1], t[2][1]))
        )

    return st.recursive(st.one_of(number, decimals), grow, max_leaves=6)


def apply(sign, a, b):
    if a is None or b is None or (sign == "/" and b == 0):
        return None
    return {"+": a + b, "-": a - b, "*": a * b, "/": a / b if b else None}[sign]


@given(expressions())
@many
def test_expressions_have_the_value_that_python_gives_them(written):
    text, value = written
    assume("(" in text and value is not None)
    inside = text[1:-1]
    stated = str(value.numerator) if value.denominator == 1 else f"{float(value):.4f}"
    (step,) = read_steps(f"So {inside} = {stated}.")
    assert step.true == value
    assert step.right
    (wrong,) = read_steps(f"So {inside} = {math.floor(value) + 7}.")
    assert wrong.true == value
    assert not wrong.right
    before, after = (f"So {inside} = {one}." for one in (stated, math.floor(value) + 7))
    assert compare_traces(before, after) == "same operations, wrong calculation"
    assert compare_traces(before, before) == "unchanged"


@given(st.one_of(garbage, st.text("0123456789+-*/()=. ", max_size=24)))
@example("1=((1))")
@many
def test_steps_of_any_text_are_what_python_makes_of_them(text):
    found = read_steps(text)
    for step in found:
        plain = step.expression.replace(",", "").replace("x", "*")
        if re.fullmatch(r"[0-9.+\-*/() ]+", plain):
            exact = re.sub(r"\d+(?:\.\d+)?|\.\d+", r"Fraction('\g<0>')", plain)
            try:
                assert step.true == eval(exact, {"Fraction": Fraction})
            except ZeroDivisionError:
                assert step.true is None
    assert compare_traces(text, text) in ("unchanged", "no steps readable")


@given(st.integers(1, 25), st.integers(0, 10**6))
@few
def test_generated_items_state_the_answer_that_python_finds(n, seed):
    for item, _, (answer,) in generators.simple_math_items(n, seed):
        assert eval(item) == int(answer)
        assert judge(answer, [answer], "number") == (True, True)
    for item, _, (answer,) in generators.addition_items(n, seed):
        assert eval(item) == int(answer)
    for _, prompt, options, right in generators.boolean_items(n, seed):
        for line in prompt.split("\n")[:-1]:
            text, _, value = line.rpartition(" is ")
            assert eval(text) is eval(value)
        asked = prompt.split("\n")[-1].removesuffix(" is")
        assert f" {eval(asked)}" == options[right]
    for _, prompt, options, right in generators.tracking_items(n, seed):
        holder = {}
        for giver, thing, taker in re.findall(
            r"(\w+) gives the (\w+) to (\w+)\.", prompt.split("\n")[-1]
        ):
            assert holder.get(thing, giver) == giver
            holder[thing] = taker
        assert options[right] == f" {holder.popitem()[1]}"
    for _, prompt, options, right in generators.elimination_items(n, seed):
        asked = prompt.split("\n")[-1]
        colours = set(re.findall(r"\ban? (\w+)", asked))
        left = colours - set(re.findall(r"has the (\w+) hat", asked))
        assert {options[right].strip()} == left


# Mining, ranks, distances

ids = st.lists(st.integers(0, 3), min_size=1, max_size=12)


def grams(row, n):
    n = min(n, len(row))
    return [tuple(row[i : i + n]) for i in range(len(row) - n + 1)]


@given(st.lists(ids, max_size=10), st.sampled_from([0.1, 0.5, 0.7, 1.0]))
@many
def test_kept_windows_are_those_that_resemble_no_earlier_one(suffixes, near):
    kept = []
    for index, suffix in enumerate(suffixes):
        one = set(grams(suffix, 5))
        others = [set(grams(suffixes[row], 5)) for row in kept]
        if not any(len(one & other) >= near * len(one | other) for other in others):
            kept.append(index)
    assert mining.distinct_windows(suffixes, near) == kept


@given(ids, ids)
@many
def test_predictable_is_the_share_of_copied_grams(prefix, suffix):
    wanted = grams(suffix, 4)
    length = len(wanted[0])
    copied = [one for one in wanted if one in grams(prefix, length) and len(prefix) >= length]
    assert mining.is_predictable(prefix, suffix) == len(copied) / len(wanted)


@given(st.lists(st.text("abc", max_size=30), max_size=4), *[st.integers(1, 6)] * 3)
@many
def test_windows_cover_their_texts_at_every_stride(texts, prefix, suffix, stride):
    lm = SimpleNamespace(
        tokenizer=lambda text, **settings: {"input_ids": [ord(letter) for letter in text]},
        encode=lambda rows: [[ord(letter) for letter in row] for row in rows],
    )
    named = [(f"t{i}", text) for i, text in enumerate(texts)]
    found = list(mining._cut(lm, named, prefix, suffix, stride))
    expected = [
        (i, f"t{i}/{start}", text[start : start + prefix + suffix])
        for i, text in enumerate(texts)
        for start in range(0, len(text), stride)
        if start + prefix + suffix <= len(text)
    ]
    assert [(i, name, "".join(map(chr, a + b))) for i, name, a, b in found] == expected
    assert all((len(a), len(b)) == (prefix, suffix) for _, _, a, b in found)


@given(st.integers(1, 8), st.randoms(use_true_random=False))
@many
def test_ndcg(k, random):
    rows = [[random.sample(range(12), k) for _ in range(3)] for _ in range(2)]
    found = ndcg(torch.tensor(rows[0]), torch.tensor(rows[1]))
    for place, (first, second) in enumerate(zip(*rows)):
        ideal = sum((k - r) / math.log2(r + 2) for r in range(k))
        by_order = sum(
            (k - first.index(token)) / math.log2(r + 2)
            for r, token in enumerate(second)
            if token in first
        )
        by_set = sum((k - r) / math.log2(r + 2) for r, one in enumerate(second) if one in first)
        assert float(found["ndcg"][place]) == pytest.approx(by_order / ideal, rel=1e-6, abs=1e-7)
        assert float(found["ndcg_paper"][place]) == pytest.approx(by_set / ideal, rel=1e-6)
        assert 0 <= found["ndcg"][place] <= 1 + 1e-12
    same = ndcg(torch.tensor(rows[0]), torch.tensor(rows[0]))["ndcg"]
    assert list(map(float, same)) == pytest.approx([1.0] * len(same), rel=1e-6)


@given(ids, ids, ids)
@many
def test_edit_distance_is_a_metric(a, b, c):
    assert levenshtein(a, b) == levenshtein(b, a)
    assert (levenshtein(a, b) == 0) == (a == b)
    assert levenshtein(a, c) <= levenshtein(a, b) + levenshtein(b, c)
    assert abs(len(a) - len(b)) <= levenshtein(a, b) <= max(len(a), len(b))
    found = recitation_scores(a, b)
    assert found["strict"] == (a == b)
    assert found["strict"] <= found["loose"]
    assert 0 <= found["token_match"] <= 1


@given(st.lists(st.tuples(*[st.sampled_from([0.0, 1.0, 2.0, math.nan])] * 2), max_size=8))
@many
def test_the_front_holds_what_nothing_dominates(points):
    def dominates(a, b):
        return all(x >= y for x, y in zip(a, b)) and a != b

    expected = [
        not any(math.isnan(x) for x in one)
        and not any(dominates(other, one) for other in points if not any(map(math.isnan, other)))
        for one in points
    ]
    assert pareto_front(np.array(points).reshape(-1, 2)).tolist() == expected


@given(st.integers(1, 20), st.integers(1, 5), st.lists(st.integers(1, 7), max_size=20))
@many
def test_progress_ends_at_the_number_of_items(items, each, parts):
    told = []
    prompts, done = items * each, 0
    step = progress_in_items(told.append, items, prompts)
    for part in parts:
        step(min(part, prompts - done))
        done = min(done + part, prompts)
    assert sum(told) == done * items // prompts
    assert all(one >= 0 for one in told)
