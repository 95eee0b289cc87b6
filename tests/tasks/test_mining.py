import json
import random

import pytest
import torch
from command_line import run
from tiny import build, tiny_config, tiny_tokenizer

import lirefs
from lirefs import Direction, mine, recitation_task, wrap
from lirefs.errors import DataFileError, SettingError, TaskError
from lirefs.organism.language import Language
from lirefs.tasks import mining
from lirefs.tasks.mining import distinct_windows, is_predictable

PREFIX = SUFFIX = 12
FIRST = "qz7m!vk2xw0p" + "Lr4tHb9sJc1n"
PLANTED = {
    "first": FIRST,
    "near": "d5gY#o8iUe3a" + FIRST[PREFIX:-1] + "?",  # 7 of its 8 grams are those of the first
    "copy": "abcdefghijkl" * 2,
}


def never_seen(n):
    rng = random.Random(0)
    letters = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789"
    return {f"unseen-{i}": "".join(rng.choices(letters, k=PREFIX + SUFFIX + 5)) for i in range(n)}


@pytest.fixture(scope="module")
def reciter():
    """A tiny Llama that has learned the planted texts, and nothing else."""
    model = build(tiny_config("llama"))
    lm = wrap(model, tiny_tokenizer(), name="reciter")
    ids = torch.tensor(lm.encode(list(PLANTED.values())))
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    with torch.enable_grad():
        for _ in range(200):
            loss = model(ids, labels=ids).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    model.zero_grad(set_to_none=True)
    return lm


@pytest.fixture
def corpus():
    return [*never_seen(6).items(), *PLANTED.items(), ("short", "too short")]


def search(lm, texts, **settings):
    return mine(lm, texts, PREFIX, SUFFIX, progress=False, **settings)


def test_exactly_the_planted_windows_are_found(reciter, corpus):
    found = search(reciter, corpus)
    assert found.counts == {
        "texts": 10,
        "windows": 9,
        "screened": 3,
        "confirmed": 3,
        "distinct": 2,
    }
    first, copy = found.windows
    assert (first.id, copy.id) == ("first/0", "copy/0")
    assert first.prefix_ids == reciter.encode([FIRST[:PREFIX]])[0]  # its start token included
    assert first.prefix_text + first.suffix_text == FIRST
    assert (first.predictable, copy.predictable) == (0, 1)
    assert search(reciter, corpus, near=0.9).counts["distinct"] == 3
    for batch_tokens in (1, 50):
        again = search(reciter, corpus, batch_tokens=batch_tokens)
        assert (again.windows, again.counts) == (found.windows, found.counts)


def test_every_stride_is_tried(reciter):
    hidden = [("hidden", "<>" + FIRST + "()")]
    assert search(reciter, hidden, stride=1).counts["windows"] == 5
    assert search(reciter, hidden, stride=2).counts["windows"] == 3
    found = search(reciter, hidden, stride=2, near=1.0)
    assert "hidden/2" in {one.id for one in found.windows}


def test_a_model_without_logits_to_keep(reciter, corpus, monkeypatch):
    wanted = search(reciter, corpus).windows
    monkeypatch.setattr(mining, "accepts", lambda model, name: False)
    assert search(reciter, corpus).windows == wanted


def test_greedy_decoding_has_the_last_word(reciter, corpus, monkeypatch):
    monkeypatch.setattr(mining, "greedy", lambda lm, prompts, n: [[0] * n for _ in prompts])
    counts = search(reciter, corpus).counts
    assert (counts["screened"], counts["confirmed"], counts["distinct"]) == (3, 0, 0)


def test_the_organism_recites_what_was_planted():
    lm, language = lirefs.load("organism", device="cpu"), Language(0)
    planted = language.items("planted", "test", 20)
    unseen = language.items("unseen", "test", 20)
    texts = [(f"{item.kind}-{i}", item.text) for i, item in enumerate([*planted, *unseen])]
    prompt = len(lm.encode([planted[0].prompt], add_special_tokens=False)[0])
    whole = len(lm.encode([planted[0].text], add_special_tokens=False)[0])
    found = mine(lm, texts, prompt, whole - prompt, progress=False)
    assert [one.id for one in found.windows] == [f"planted-{i}/0" for i in range(20)]


def test_near_duplicates_against_all_pairs():
    rng = random.Random(0)
    base = [[rng.randrange(50) for _ in range(20)] for _ in range(4)]
    sequences = []
    for _ in range(60):
        one = list(rng.choice(base))
        for _ in range(rng.randrange(3)):
            one[rng.randrange(20)] = rng.randrange(50)
        sequences.append(one)

    def grams(one):
        return {tuple(one[i : i + 5]) for i in range(16)}

    for near in (0.3, 0.7, 1.0):
        kept = []
        for index, one in enumerate(sequences):
            similar = [
                len(grams(one) & grams(sequences[k])) / len(grams(one) | grams(sequences[k]))
                for k in kept
            ]
            if all(value < near for value in similar):
                kept.append(index)
        assert distinct_windows(sequences, near) == kept
        assert 4 <= len(kept) < 60
    assert distinct_windows([[1, 2], [1, 2], [1, 3]], 0.7) == [0, 2]  # shorter than a gram


def test_predictable_counts_grams_of_the_suffix():
    prefix = [1, 2, 3, 4, 5, 6, 7]
    assert is_predictable(prefix, [1, 2, 3, 4, 9]) == 1 / 2
    assert is_predictable(prefix, [3, 4, 5, 6, 7]) == 1
    assert is_predictable(prefix, [7, 1, 2, 3]) == 0
    assert is_predictable([1, 2], [1, 2, 3, 4]) == 0  # a prefix shorter than a gram holds none
    assert is_predictable(prefix, [2, 3]) == 1


def test_an_interrupted_search_goes_on(reciter, corpus, tmp_path, monkeypatch):
    journal = tmp_path / "new" / "j.partial"
    settings = {"batch_tokens": 48, "journal": journal}  # two windows a batch, five batches
    whole = search(reciter, corpus, batch_tokens=48)
    real, calls = mining._search, []

    def fails_at_the_fourth(lm, windows, n):
        calls.append(len(windows))
        if len(calls) == 4:
            raise KeyboardInterrupt
        return real(lm, windows, n)

    monkeypatch.setattr(mining, "_search", fails_at_the_fourth)
    with pytest.raises(KeyboardInterrupt):
        search(reciter, corpus, **settings)
    assert len(journal.read_text().splitlines()) == 4  # settings and three batches
    with journal.open("a") as file:
        file.write('{"windows": 2, "scr')  # killed while it wrote
    calls.extend([0, 0])
    assert search(reciter, corpus, **settings) == whole
    assert calls[6:] == [2, 1]
    assert search(reciter, corpus, **settings) == whole
    assert len(calls) == 8  # nothing was left to do

    with pytest.raises(SettingError, match="another model, other texts or other settings"):
        search(reciter, corpus[1:], **settings)
    with pytest.raises(SettingError, match="another model, other texts or other settings"):
        search(reciter, corpus, near=0.5, **settings)
    journal.write_text("nonsense\n")
    with pytest.raises(DataFileError, match="damaged"):
        search(reciter, corpus, **settings)
    header = json.dumps(whole.provenance)
    for part in (
        '{"windows": 1}',
        '{"windows": -1, "screened": 0, "recited": []}',
        '{"windows": 1000000, "screened": 0, "recited": []}',
        '{"windows": 1, "screened": 1, "recited": [["first/0", [1], [2]]]}',
        "[" * 100_000,
    ):
        journal.write_text(f"{header}\n{part}\n")
        with pytest.raises(DataFileError, match="damaged"):
            search(reciter, corpus, **settings)
    for begun in (header[:20], header + "\n" + '{"win'):  # killed while the first batch was written
        journal.write_text(begun)
        assert search(reciter, corpus, **settings) == whole
        assert search(reciter, corpus, **settings) == whole


def test_named_errors(reciter, corpus):
    lm = reciter
    for settings, message in [
        ((0, 5), "prefix_tokens must be at least 1"),
        ((5, 0), "suffix_tokens must be at least 1"),
        ((5, 5, 0), "stride must be at least 1"),
        ((5, 5, 5, 0.0), r"near is 0.0"),
        ((64, 64), "longer than the 128"),
        ((50, 50), "none of the 10 texts has the 50 \\+ 50 tokens"),
    ]:
        with pytest.raises(SettingError, match=message):
            mine(lm, corpus, *settings, progress=False)
    with pytest.raises(SettingError, match="two texts are called 'first'"):
        search(lm, [*corpus, ("first", "again")])
    steer = lirefs.Steer(Direction(torch.ones(32), 1), "add", 1.0)
    with steer.apply(lm.model), pytest.raises(SettingError, match="cannot be mined"):
        search(lm, corpus)


def test_the_command_writes_what_recitation_reads(reciter, corpus, tmp_path, monkeypatch, capsys):
    model, texts = tmp_path / "model", tmp_path / "texts"
    reciter.model.save_pretrained(model)
    reciter.tokenizer.save_pretrained(model)
    texts.mkdir()
    for name, text in corpus[:8]:
        (texts / f"{name}.txt").write_text(text)
    rows = tmp_path / "rows.jsonl"
    rows.write_text("\n".join(json.dumps({"id": name, "text": text}) for name, text in corpus[8:]))
    out = tmp_path / "mined.jsonl"
    arguments = ["mine", texts, rows, "--model", model, "--out", out]
    arguments += ["--prefix-tokens", PREFIX, "--suffix-tokens", SUFFIX]
    assert run(monkeypatch, *arguments) == 0
    said = capsys.readouterr().out
    assert "10 texts, 9 windows, 3 screened, 3 confirmed, 2 distinct" in said
    assert "1 of the distinct ones" in said
    assert sorted(one.name for one in tmp_path.glob("mined*")) == [
        "mined.jsonl",
        "mined.jsonl.json",
    ]
    about = json.loads((tmp_path / "mined.jsonl.json").read_text())
    assert about["counts"]["distinct"] == 2
    assert about["model"] == reciter.fingerprint
    assert (about["prefix_tokens"], about["near"]) == (PREFIX, 0.7)

    task = recitation_task(reciter, out)
    assert {item for item, _, _ in task.items} == {f"{texts}/first.txt/0", "copy/0"}
    assert [one.scores["strict"] for one in task.run(reciter, lambda n: None)] == [1, 1]
    other = wrap(reciter.model, tiny_tokenizer(bos=False))
    with pytest.raises(TaskError, match="another tokenizer"):
        recitation_task(other, out)

    bad = tmp_path / "bad.txt"
    bad.write_bytes(b"ab\xff")
    (tmp_path / "none").mkdir()
    (tmp_path / "no_text.jsonl").write_text('{"id": 1}')
    for source, error in [
        (tmp_path / "absent.txt", "DataFileError: "),
        (bad, "not UTF-8 (byte 3)"),
        (tmp_path / "none", "without a .txt file"),
        (tmp_path / "no_text.jsonl", "line 1: needs a string 'text'"),
    ]:
        assert run(monkeypatch, "mine", source, "--model", model, "--out", out, "--force") == 2
        assert error in capsys.readouterr().err
    assert run(monkeypatch, "mine", texts, "--model", model, "--out", tmp_path) == 2
    assert "is a folder" in capsys.readouterr().err
    # A corpus without a window leaves nothing behind.
    assert run(monkeypatch, "mine", texts, "--model", model, "--out", tmp_path / "x.jsonl") == 2
    assert "SettingError: none of the 8 texts" in " ".join(capsys.readouterr().err.split())
    assert not list(tmp_path.glob("x.jsonl*"))
