import json
import re
from pathlib import Path

import pytest
import torch
from scored import run
from tiny import tiny_model, tiny_tokenizer
from transformers import AutoTokenizer, ByT5Tokenizer

import lirefs
from lirefs import StressTest, recitation_task, wrap
from lirefs.errors import DataFileError, TaskError
from lirefs.files import cache_dir, read_jsonl
from lirefs.model.builtin import SMOLLM2_SHA256
from lirefs.tasks.items import common_prefix
from lirefs.tasks.recitation import levenshtein, recitation_scores, suffix_start
from lirefs.tasks.texts import plain_texts

SHARED = Path(__file__).parents[3] / "shared" / "data"
# Of the user's cache: a test has one of its own.
SMOLLM2 = cache_dir() / "models" / f"smollm2-135m-{SMOLLM2_SHA256[:8]}"
TEXTS = ["Attitude is all", "one  two\n\nthree", "a \u2603 and \U0001f600x", "don't stop", " lead"]


def test_scores_of_one_continuation():
    assert recitation_scores([1, 2, 3, 4], [1, 2, 3, 4]) == {
        "strict": 1.0,
        "loose": 1.0,
        "levenshtein": 0.0,
        "token_match": 1.0,
    }
    # A shift by one is two edits, and no position is right.
    shifted = recitation_scores([9, 1, 2, 3, 4, 5, 6, 7], [1, 2, 3, 4, 5, 6, 7, 8])
    assert shifted == {"strict": 0.0, "loose": 1.0, "levenshtein": 0.25, "token_match": 0.0}
    assert recitation_scores([1], [1, 2])["token_match"] == 0.5
    assert levenshtein("kitten", "sitting") == 3
    assert levenshtein("", "abc") == levenshtein("abc", "") == 3
    assert levenshtein("abcdef", "bcdefa") == 2
    assert common_prefix([1, 2, 9], [1, 2, 3, 4]) == 2
    assert common_prefix([1, 2], [1, 2, 3]) == common_prefix([1, 2, 3], [1, 2]) == 2
    assert common_prefix([], [1]) == 0


@pytest.fixture(scope="module")
def tokenizers():
    """A byte-level BPE with its spaces inside tokens, characters with a start token, bytes."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    made = [tiny_tokenizer(), ByT5Tokenizer()]
    for trim in (True, False):
        core = Tokenizer(models.BPE())
        core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        core.decoder = decoders.ByteLevel()
        core.post_processor = processors.ByteLevel(trim_offsets=trim)
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(
            vocab_size=300, initial_alphabet=alphabet, show_progress=False
        )
        core.train_from_iterator(TEXTS * 5, trainer)
        made.append(PreTrainedTokenizerFast(tokenizer_object=core))
    return made


def begins_by_brute_force(tokenizer, text):
    """Characters before each token, spaces that begin it counted, from decoding its head."""
    ids = tokenizer(text)["input_ids"]
    if ids[-1:] == tokenizer("")["input_ids"][-1:]:
        ids = ids[:-1]  # appended by the tokenizer, and not of the text
    begins = []
    for index in range(len(ids)):
        head = tokenizer.decode(ids[:index], skip_special_tokens=True).rstrip("\ufffd")
        tail = tokenizer.decode(ids[: index + 1], skip_special_tokens=True)
        piece = tail[len(head) :]
        blank = len(piece) - len(piece.lstrip()) if piece.strip() and piece.strip("\ufffd ") else 0
        begins.append(len(head) + blank)
    return ids, begins


@pytest.mark.parametrize("which", range(4))
@pytest.mark.parametrize("text", TEXTS)
def test_the_suffix_begins_at_a_token_of_the_whole_text(tokenizers, which, text):
    tokenizer = tokenizers[which]
    if which == 0 and not (text.isascii() and text.isprintable()):
        pytest.skip("no such characters in the tiny vocabulary")
    whole, begins = begins_by_brute_force(tokenizer, text)
    for cut in range(1, len(text)):
        ids, start = suffix_start(tokenizer, text, cut)
        assert ids == whole
        wanted = next((i for i, begin in enumerate(begins) if begin >= cut), len(ids))
        assert start == wanted, (cut, tokenizer.convert_ids_to_tokens(ids))


def test_a_word_divided_by_the_cut_stays_whole(tokenizers):
    tokenizer = tokenizers[2]
    ids, start = suffix_start(tokenizer, "Attitude is all", 3)
    assert tokenizer.decode(ids[start:]) == " is all"
    assert tokenizer.decode(ids[:start]) == "Attitude"
    for cut in (8, 9):  # a space belongs to the word after it, on whichever side it stands
        ids, start = suffix_start(tokenizer, "Attitude is all", cut)
        assert tokenizer.decode(ids[start:]) == " is all"


def test_a_slow_tokenizer_that_loses_text_is_refused(tokenizers, monkeypatch):
    slow = ByT5Tokenizer()
    monkeypatch.setattr(slow, "decode", lambda *args, **kwargs: "other")
    with pytest.raises(TaskError, match="does not decode a text to itself"):
        suffix_start(slow, "a text", 2)


def test_real_quotes_are_cut_at_tokens_of_the_whole_quote(lm, tmp_path):
    if not SMOLLM2.is_dir():
        pytest.skip(f"no SmolLM2 at {SMOLLM2}")
    path = SHARED / "quotes.jsonl"
    if not path.exists():
        pytest.skip(f"no {path}")
    tokenizer = AutoTokenizer.from_pretrained(SMOLLM2)
    reader = wrap(tiny_model("llama"), tokenizer)  # its vocabulary plays no part in the cutting
    rows = [row for _, row in read_jsonl(path)]
    items = recitation_task(reader, path).items
    assert len(items) == len(rows) > 400
    divided = 0
    for row, (_, prefix, suffix) in zip(rows, items):
        text = row["prefix"] + row["suffix"]
        assert [*prefix, *suffix] == tokenizer(text)["input_ids"]
        head, tail = tokenizer.decode(prefix), tokenizer.decode(suffix)
        assert head + tail == text
        spaces = len(tail) - len(tail.lstrip())
        assert len(head) + spaces >= len(row["prefix"])
        # No earlier token would do.
        last = tokenizer.decode(prefix[-1:])
        assert len(head) - len(last.lstrip() or last) < len(row["prefix"])
        divided += len(head) > len(row["prefix"])
    assert divided > 5
    eight = tmp_path / "eight.jsonl"
    eight.write_text("\n".join(json.dumps({**row, "suffix_tokens": 8}) for row in rows))
    for row, (_, prefix, suffix) in zip(rows, recitation_task(reader, eight).items):
        assert len(suffix) == 8
        assert [*prefix, *suffix] == tokenizer(row["prefix"] + row["suffix"])["input_ids"]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prefix": "a", "suffix": 3}, "needs 'text'"),
        ({"prefix": "abc"}, "needs 'text'"),
        ({"prefix": "", "suffix": "ab"}, "too short"),
        ({"text": "abcdef", "suffix_tokens": 0}, "positive integer"),
        ({"text": "abcdef", "suffix_tokens": "2"}, "positive integer"),
        ({"text": "abc", "suffix_tokens": 4}, "too short"),
        ({"prefix_ids": [1, "2"], "suffix_ids": [3]}, "lists of token ids"),
        (
            {"prefix_ids": [1, 2], "suffix_ids": [128]},
            "128 is outside the 128 tokens of tiny-llama",
        ),
        ({"prefix_ids": [1], "suffix_ids": [3], "tokenizer": "f00"}, "another tokenizer"),
    ],
)
def test_rows_that_cannot_be_cut(lm, tmp_path, row, message):
    path = tmp_path / "m.jsonl"
    path.write_text(json.dumps(row))
    with pytest.raises(TaskError, match=f"line 1: .*{message}"):
        recitation_task(lm, path)


def test_stress_test_prompts():
    task = StressTest("s", [("a", [1], [2])], shifts=2)
    asked = task.prompts([0, 11, 12, 13, 14], [21, 22, 23], bos=0)
    assert asked == [
        ([0, 11, 12, 13, 14], [21, 22, 23]),
        ([0, 11, 12, 13, 14, 21], [22, 23]),
        ([0, 11, 12, 13, 14, 21, 22], [23]),
        ([0, 12, 13, 14], [21, 22, 23]),  # three tokens are left: more than t, and no fewer
    ]
    assert task.prompts([11, 12], [21]) == [([11, 12], [21])]
    assert len(StressTest("s", task.items).prompts(range(64), range(48))) == 41


@pytest.mark.parametrize("family", ["llama", "gpt2", "bloom"])
def test_stress_test_agrees_with_one_prompt_at_a_time(family):
    lm = wrap(tiny_model(family), tiny_tokenizer())
    prefixes = lm.encode(["some prefix", "x, and another one that is longer", "no"])
    items = []
    for number, prefix in enumerate(prefixes):
        said = list(prefix)
        for _ in range(8):
            with torch.no_grad():
                logits = lm.model(torch.tensor([said]), use_cache=False).logits
            said.append(int(logits[0, -1].argmax()))
        suffix = said[len(prefix) :]
        if number == 1:  # wrong at first and right after: only longer prompts match
            suffix[0] = (suffix[0] + 1) % 100
        items.append((f"{number}", prefix, suffix))
    task = StressTest("stress", items, shifts=3)
    seen = set()
    for result, (_, prefix, suffix) in zip(run(task, lm), items):
        matches = []
        for prompt, rest in task.prompts(prefix, suffix, bos=0):
            ids, n = list(prompt), 0
            for token in rest:
                with torch.no_grad():
                    logits = lm.model(torch.tensor([ids]), use_cache=False).logits
                ids.append(int(logits[0, -1].argmax()))
                if ids[-1] != token:
                    break
                n += 1
            matches.append(n)
        assert result.scores == {"original": matches[0], "perturbed": max(matches)}
        seen |= {(matches[0], max(matches))}
    assert (8, 8) in seen
    assert any(best > original for original, best in seen)
    (alone,) = run(task.subset([1]), lm)
    assert alone == task.run(lm, lambda n: None)[1]


def test_stress_test_named_errors():
    with pytest.raises(TaskError, match="no items"):
        StressTest("s", [])
    with pytest.raises(TaskError, match="empty prefix"):
        StressTest("s", [("a", [], [1])])
    with pytest.raises(TaskError, match="shifts must be at least 0"):
        StressTest("s", [("a", [1], [1])], shifts=-1)


STRINGS = ["the first text is here", "a second text of mine", "and a third of these texts"]


def test_one_door_for_strings_rows_and_files(lm, tmp_path):
    """Every way of giving the same texts gives the same items, and windows to mine."""
    rows = [{"id": f"item-{i}", "text": text} for i, text in enumerate(STRINGS)]
    folder = tmp_path / "folder"
    folder.mkdir()
    for i, text in enumerate(STRINGS):
        (folder / f"{i}.txt").write_text(text)
    lines = "\n".join(map(json.dumps, rows))
    for name in ("rows.jsonl", "rows", "rows.txt"):  # rows are known by their first character
        (tmp_path / name).write_text(lines)
    by_id = [(row["id"], row["text"]) for row in rows]
    ways = [
        STRINGS, by_id, rows, str(tmp_path / "rows.jsonl"), tmp_path / "rows.jsonl",
        tmp_path / "rows", tmp_path / "rows.txt", [tmp_path / "rows.jsonl"],
        [STRINGS[0], by_id[1], rows[2]],
    ]  # fmt: skip
    wanted = recitation_task(lm, STRINGS).items
    assert [len(suffix) for *_, suffix in wanted] == [12, 12, 12]
    assert lm.tokenizer.decode(wanted[1][1] + wanted[1][2]) == "<s>" + STRINGS[1]
    for way in ways:
        assert recitation_task(lm, way).items == wanted
        assert plain_texts(way, "texts") == by_id
    for way in (folder, [folder], sorted(folder.iterdir())):
        items = recitation_task(lm, way).items
        assert [item[1:] for item in items] == [item[1:] for item in wanted]
        assert items[0][0] == str(folder / "0.txt")
    found = [lirefs.mine(lm, way, 4, 4, progress=False) for way in (STRINGS, ways[4])]
    assert {one.provenance["texts"] for one in found} == {found[0].provenance["texts"]}
    # Rows of several files may have the same lines: their ids name the file.
    two = [tmp_path / "a.jsonl", tmp_path / "b.jsonl"]
    for file in two:
        file.write_text(json.dumps({"text": STRINGS[0]}))
    items = recitation_task(lm, two).items
    assert [item[0] for item in items] == [f"{file}:1" for file in two]


def test_how_much_of_a_string_is_recited(lm):
    texts = [STRINGS[0], {"text": STRINGS[1], "suffix_tokens": 3}]
    task = recitation_task(lm, texts, suffix_tokens=5)
    assert [len(suffix) for *_, suffix in task.items] == [5, 3]
    with pytest.raises(TaskError, match="suffix_tokens must be at least 1"):
        recitation_task(lm, STRINGS, suffix_tokens=0)


def test_a_file_of_many_texts_is_one_item_and_a_warning_says_so(lm, tmp_path, caplog):
    path = tmp_path / "strings.txt"
    path.write_text("\n".join(["a string of text"] * 20))
    assert len(recitation_task(lm, path)) == 1
    (said,) = caplog.messages
    assert re.search(r"strings\.txt is one item of 321 tokens, and the model reads 128: a", said)
    assert "JSON Lines or a list of strings" in said
    caplog.clear()
    path.write_text("\n".join(["a string of text"] * 2))
    assert len(recitation_task(lm, path)) == 1
    assert len(recitation_task(lm, path.read_text().split("\n"))) == 2
    assert not caplog.messages


@pytest.mark.parametrize(
    ("texts", "error", "message"),
    [
        ([3], TaskError, "texts: item 0 must be a tuple or a mapping of id, text, got 3"),
        ([("a", "b", "c")], TaskError, "texts: item 0 has 3 value"),
        ([{"txt": "a"}], TaskError, "texts: item 0: needs 'text'"),
        (["a"], TaskError, "texts: item 0: too short"),
        ([], TaskError, "no items"),
        ("the text itself", DataFileError, r"the text itself: no such file; .*in a list"),
        ("\n".join(["a longer string"] * 99), DataFileError, r"a longer string a .*in a list"),
        ("nul \0 byte", DataFileError, "in a list"),
    ],
)
def test_texts_that_are_not_texts(lm, texts, error, message):
    with pytest.raises(error, match=message):
        recitation_task(lm, texts)
