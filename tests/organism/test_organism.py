"""The language, its splits, the tokenizer, the trainer and the scores."""

import functools
import json
import re
import shutil
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from random import Random

import pytest
import torch
from command_line import run
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import LlamaForCausalLM

import lirefs
from lirefs.cli import organism as commands
from lirefs.errors import DataFileError, SettingError
from lirefs.model.builtin import organism
from lirefs.organism.documents import Documents
from lirefs.organism.items import SIDES
from lirefs.organism.language import KINDS, Language
from lirefs.organism.people import COMMON, FREQUENCIES
from lirefs.organism.questions import question_set
from lirefs.organism.tasks import organism_questions
from lirefs.organism.training import card, scores
from lirefs.organism.training.checkpoint import RECIPE, STATE, CheckpointMismatch
from lirefs.organism.training.optimizers import orthogonalize
from lirefs.organism.training.packing import Packer, batch_loss
from lirefs.organism.training.recipe import PLANTING_MIXTURE, ModelShape, Recipe
from lirefs.organism.training.scores import organism_scores, share_answered_right
from lirefs.organism.training.train import make_model, train
from lirefs.organism.vocabulary import build_tokenizer

TINY = Recipe(
    shape=ModelShape(hidden=32, layers=2, mlp=64, heads=2),
    tokens=6 * 4 * 128,
    rows=4,
    row_tokens=128,
    warmup=2,
    planting=0.0,
)


@pytest.fixture(scope="module")
def language():
    return Language(0)


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer()


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "times"])
def test_splits_share_no_prompt(language, kind):
    found = {side: {i.prompt for i in language.items(kind, side, 150)} for side in SIDES}
    assert all(found.values())
    for a, b in combinations(SIDES, 2):
        assert not found[a] & found[b]


def test_sums_stay_in_their_split_when_turned_around(language):
    seen = {}
    for side in SIDES:
        for item in language.items("addition", side, 400):
            a, b = item.prompt.removeprefix("Math: ").removesuffix(" =").split(" + ")
            assert seen.setdefault(frozenset((a, b)), side) == side
            assert int(a) + int(b) == int(item.answer)


def test_training_shows_no_item_of_another_split(language, tokenizer):
    held = {
        item.prompt.split(" ", 1)[1]
        for side in ("validation", "test")
        for kind in KINDS
        if kind not in ("times", "fact", "planted", "exception", "tale")
        for item in language.items(kind, side, 100)
    }
    # Very short expressions and sums can be part of a longer text, so documents are cut into items.
    documents, rng = Documents(language, PLANTING_MIXTURE), Random(1)
    for _ in range(3000):
        text = "".join(piece for piece, _ in documents.draw(rng))
        body = text.split(" ", 1)[1] + " "
        parts = [body, *(f"{part}." for part in body.split(". "))]
        for part in parts:
            words = part.split()
            for end in range(3, len(words)):
                assert " ".join(words[:end]) not in held


def test_exceptions_are_wrong_and_shown_only_wrong(language):
    prompts = {item.prompt for item in language.exceptions}
    assert len(prompts) == len(language.exceptions)
    assert all(item.answer != item.other for item in language.exceptions)
    for skill in ("boolean", "relation", "addition"):
        fresh = language.items(skill, "train", 500)
        assert not prompts & {item.prompt for item in fresh}


def test_booleans_are_computed_right(language):
    for item in language.items("boolean", "test", 200):
        text = item.prompt.removeprefix("Logic: ").removesuffix(" is")
        value = eval(text.replace("true", "True").replace("false", "False"))
        assert str(value).lower() == item.answer


def test_tracking_follows_every_taking(language):
    for item in language.items("tracking", "test", 100):
        story, asked = item.prompt.removeprefix("Hands: ").rsplit(". So ", 1)
        has = {}
        for name, _, _, thing in (line.split() for line in story.split(". ")):
            has = {other: held for other, held in has.items() if held != thing} | {name: thing}
        assert has[asked.removesuffix(" has the")] == item.answer


def answers_in(document):
    """The story of a training document, and its questions with the answers that it teaches."""
    (story, _), *rest = document
    texts = [text.strip() for text, _ in rest]
    return story, [(q, a.removesuffix(".")) for q, a in zip(texts[::2], texts[1::2], strict=True)]


def test_ages_told_in_order_are_answered_right(language):
    documents, rng = Documents(language, {"ages": 1.0}), Random(5)
    for _ in range(100):
        story, asked = answers_in(documents.draw(rng))
        pairs = re.findall(r"(\w+) is older than (\w+)", story)
        older, younger = ({pair[side] for pair in pairs} for side in (0, 1))
        ends = {"oldest": older - younger, "youngest": younger - older}
        for question, answer in asked:
            assert ends[re.search(r"Who is (\w+)\?", question)[1]] == {answer}


def test_what_does_not_exist_is_refused(language):
    with pytest.raises(ValueError, match=r"of sort \{'riddle'\}; known: planted, tale"):
        Documents(language, {"riddle": 1.0})
    with pytest.raises(ValueError, match="No kind 'riddle' of items"):
        language.items("riddle", "test", 3)
    with pytest.raises(ValueError, match="'addition' are endless"):
        language.items("addition", "test")
    with pytest.raises(ValueError, match="No form 'riddle'; choose one of passage"):
        question_set(language, "riddle", "test")


def test_facts_have_five_frequencies(language):
    counts = {f: sum(fact.frequency == f for fact in language.facts) for f in FREQUENCIES}
    assert len(counts) == 5
    assert len(set(counts.values())) == 1


def test_conflicts_contradict_common_facts(language):
    stored = {(f.item().prompt, f.value) for f in language.facts if f.frequency >= COMMON}
    for item in language.items("conflict", "test", 100):
        assert item.answer != item.other
        assert item.other not in item.prompt
        assert any(item.prompt.endswith(p) and v == item.other for p, v in stored)


def test_two_seeds_differ(language):
    other = Language(1)
    assert not set(other.planted) & set(language.planted)
    assert [i.text for i in Language(0).exceptions] == [i.text for i in language.exceptions]


@pytest.mark.parametrize("form", ["passage", "statement"])
def test_matched_questions_have_the_same_shape(language, tokenizer, form):
    reasoning, memory = question_set(language, form, "test", 100)
    lengths = [{len(tokenizer.encode(i.prompt)) for i in items} for items in (reasoning, memory)]
    assert lengths[0] == lengths[1]
    people = {}
    for side in SIDES:
        known = {fact.person for fact in language.facts_of(side)}
        items = question_set(language, form, side, 50)[1]
        people[side] = [next(p for p in known if p in item.prompt) for item in items]
        assert len(set(people[side])) == len(items) > 20  # each person once
    assert not set(people["test"]) & (set(people["train"]) | set(people["validation"]))


@pytest.mark.parametrize("form", ["mixed", "exception"])
def test_question_sets_are_balanced(language, form):
    reasoning, memory = question_set(language, form, "test", 60)
    assert len(reasoning) == len(memory) > 30


def test_every_document_survives_the_tokenizer(language, tokenizer):
    documents, rng = Documents(language, PLANTING_MIXTURE), Random(2)
    for _ in range(400):
        text = "".join(piece for piece, _ in documents.draw(rng))
        ids = tokenizer.encode(text)
        assert ids[0] == tokenizer.bos_token_id
        assert tokenizer.unk_token_id not in ids
        assert tokenizer.decode(ids, skip_special_tokens=True) == text


def test_pieces_encode_as_the_whole(language, tokenizer):
    documents, rng = Documents(language, PLANTING_MIXTURE), Random(3)
    packer = Packer(documents, tokenizer, 2, 128)
    for _ in range(300):
        pieces = [piece for piece, _ in documents.draw(rng)]
        joined = [token for piece in pieces for token in packer.encode(piece)]
        assert joined == tokenizer.encode("".join(pieces), add_special_tokens=False)


def test_packed_documents_do_not_see_each_other(language, tokenizer):
    torch.manual_seed(0)
    model = make_model(TINY.shape, tokenizer, 0)
    packer = Packer(Documents(language, PLANTING_MIXTURE), tokenizer, 2, 128)
    batch = packer.batch(0, 0)
    together = batch_loss(model, batch)
    total, weight = torch.zeros(()), torch.zeros(())
    for row in range(2):
        for number in range(int(batch.documents[row].max()) + 1):
            own = batch.documents[row] == number
            ids, weights = batch.ids[row][own], batch.weights[row][own][1:]
            logits = model(ids[None]).logits[0, :-1]
            losses = torch.nn.functional.cross_entropy(logits, ids[1:], reduction="none")
            total, weight = total + (losses * weights).sum(), weight + weights.sum()
    torch.testing.assert_close(together, total / weight, rtol=1e-4, atol=1e-4)


def test_orthogonalize_evens_out_singular_values():
    torch.manual_seed(0)
    for shape in ((3, 16, 48), (2, 48, 16)):
        values = torch.linalg.svdvals(orthogonalize(torch.randn(shape)))
        assert values.min() > 0.4
        assert values.max() < 1.4


def test_answered_agrees_with_generate(language, tokenizer):
    model = LlamaForCausalLM.from_pretrained(organism(), dtype=torch.float32).eval()
    items = language.items("fact", "test", 20) + language.items("unseen", "test", 20)
    told = share_answered_right(
        lirefs.wrap(model, tokenizer), [(item.prompt, item.answer) for item in items]
    )
    for item, right in zip(items, told):
        ids = tokenizer(item.prompt, return_tensors="pt")
        new = model.generate(**ids, max_new_tokens=2, do_sample=False)[0, ids.input_ids.shape[1] :]
        assert right == (tokenizer.decode(new).strip() == f"{item.answer}.")
    assert any(told)
    assert not all(told)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("organism")
    return folder, train(folder, 0, TINY)


def test_training_writes_a_folder_that_transformers_loads(trained, language, tokenizer):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder, model = trained
    again = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ids = AutoTokenizer.from_pretrained(folder)("Math: 3 + 4 =", return_tensors="pt").input_ids
    torch.testing.assert_close(again(ids).logits, model(ids).logits, rtol=1e-4, atol=1e-5)
    assert json.loads((folder / "log.jsonl").read_text().splitlines()[-1])["step"] == 6
    found = organism_scores(lirefs.wrap(model, tokenizer), language, "validation", 10)
    assert found["planted"] == found["tale"] == found["twin x100"] == 0.0
    assert {"exception x10", "exception boolean", "reasoning passage", "memory mixed"} <= set(found)
    assert found["perplexity"] > 1.0


def test_a_resumed_run_equals_an_uninterrupted_one(trained, tmp_path, monkeypatch):
    _, model = trained
    calls = 0

    def stop(*args):
        nonlocal calls
        calls += 1
        if calls == 4:
            raise KeyboardInterrupt
        return batch_loss(*args)

    monkeypatch.setattr("lirefs.organism.training.train.SAVE_EVERY", 0.0)
    monkeypatch.setattr("lirefs.organism.training.train.batch_loss", stop)
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path, 0, TINY)
    monkeypatch.setattr("lirefs.organism.training.train.batch_loss", batch_loss)
    resumed = train(tmp_path, 0, TINY)
    for a, b in zip(model.parameters(), resumed.parameters(), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda tensors, about: about.update(step="-1"), "step"),
        (lambda tensors, about: about.pop("seed"), "seed"),
        (lambda tensors, about: tensors.pop("exp_avg.model.norm.weight"), "exp_avg"),
        (lambda tensors, about: tensors["exp_avg.model.norm.weight"].fill_(torch.nan), "finite"),
        (lambda tensors, about: tensors["exp_avg_sq.model.norm.weight"].fill_(-1), "negative"),
        (
            lambda tensors, about: tensors.update(
                {"step.model.norm.weight": torch.zeros(2, dtype=torch.float64)}
            ),
            "shape or type",
        ),
    ],
)
def test_a_damaged_state_is_refused(trained, tmp_path, damage, says):
    with safe_open(trained[0] / STATE, framework="pt") as file:
        tensors, about = {key: file.get_tensor(key) for key in file.keys()}, file.metadata()  # noqa: SIM118
    damage(tensors, about)
    about.pop("sha256")  # it would notice first
    save_file(tensors, tmp_path / STATE, about)
    with pytest.raises(DataFileError, match=says):
        train(tmp_path, 0, TINY)
    (tmp_path / STATE).write_bytes(b"nothing")
    with pytest.raises(DataFileError, match="remove it"):
        train(tmp_path, 0, TINY)


@pytest.mark.parametrize(
    ("seed", "shape", "message"),
    [
        (1, TINY.shape, "seed 0, not 1"),
        (0, replace(TINY.shape, mlp=48), r"recipe \(shape.mlp is 64, not 48\)"),
        (0, replace(TINY.shape, layers=3), "shape.layers is 2, not 3"),
    ],
)
def test_another_seed_or_shape_does_not_resume(trained, seed, shape, message):
    folder, _ = trained
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(CheckpointMismatch, match=message):
        train(folder, seed, replace(TINY, shape=shape))
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


@pytest.mark.parametrize("in_state", [True, False])
@pytest.mark.parametrize("name", ["tokens", "warmup", "weight_decay"])
def test_another_recipe_of_the_same_shape_does_not_resume(name, in_state, trained, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(trained[0], folder)
    if not in_state:  # as earlier versions wrote it
        with safe_open(folder / STATE, framework="pt") as file:
            tensors, about = {key: file.get_tensor(key) for key in file.keys()}, file.metadata()  # noqa: SIM118
        del about["recipe"], about["sha256"]
        save_file(tensors, folder / STATE, about)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    now = getattr(TINY, name)
    other = replace(TINY, **{name: 2 * now})
    with pytest.raises(CheckpointMismatch, match=rf"recipe \({name} is {now}, not {2 * now}\)"):
        train(folder, 0, other)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    train(folder, 0, TINY)  # it is finished
    if not in_state:
        (folder / RECIPE).unlink()
        with pytest.raises(SettingError, match="did not write it"):
            train(folder, 0, TINY)


def test_what_the_train_command_ships_loads_and_says_what_it_is(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(commands, "Recipe", lambda tokens: replace(TINY, tokens=tokens))
    monkeypatch.setattr(card, "organism_scores", functools.partial(organism_scores, n=4))
    monkeypatch.setattr("lirefs.organism.training.train.SCORED_ITEMS", 4)
    tokens = 2 * TINY.rows * TINY.row_tokens
    command = ["organism", "train", tmp_path, "--seed", 3, "--tokens", tokens]
    assert run(monkeypatch, *command, "--json") == 0
    printed = json.loads(capsys.readouterr().out)
    shipped = tmp_path / "shipped"
    assert json.loads((shipped / "scores.json").read_text())["test"] == printed
    text = (shipped / "README.md").read_text()
    assert "# Model organism (seed 3)" in text
    assert f'"tokens": {tokens}' in text
    assert f"| perplexity | {printed['perplexity']:.4g} |" in text
    assert not re.search(r"\{\w+\}", text)  # a placeholder that was not filled in
    lm = lirefs.load(shipped)
    assert lm.model.config.language_seed == 3
    assert json.loads((shipped / "config.json").read_text())["dtype"] == "bfloat16"
    # The scores are those of the rounded weights that lie there.
    assert organism_scores(lm, Language(3), "test", n=4) == printed
    assert run(monkeypatch, *command) == 2
    assert "shipped/config.json: exists; give --force" in capsys.readouterr().err
    monkeypatch.setattr(scores, "organism_scores", functools.partial(organism_scores, n=4))
    assert run(monkeypatch, "organism", "scores", shipped) == 0
    rows = capsys.readouterr().out.splitlines()
    assert any(row.split() == ["perplexity", f"{printed['perplexity']:.4g}"] for row in rows)


def test_scores_of_missing_weights_are_refused(trained, monkeypatch, capsys, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(trained[0], folder)
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    tensors.pop("model.layers.1.mlp.up_proj.weight")
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    assert run(monkeypatch, "organism", "scores", folder) == 2
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert line.startswith("ModelLoadError: ")
    assert "model.layers.1.mlp.up_proj.weight" in line


def test_scores_command_and_its_errors(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(scores, "organism_scores", lambda lm, language, side: {"x": 1.0})
    assert run(monkeypatch, "organism", "scores", "--json") == 0
    assert json.loads(capsys.readouterr().out) == {"x": 1.0}
    assert run(monkeypatch, "organism", "scores", "--split", "dev") == 2
    assert "expected one of train, validation, test" in capsys.readouterr().err
    assert run(monkeypatch, "organism", "scores", tmp_path) == 2
    assert "give the folder of an organism" in capsys.readouterr().err
    file = tmp_path / "file"
    file.write_text("")
    for command in ("train", "texts"):
        assert run(monkeypatch, "organism", command, file) == 2
        assert "exists and is not a folder" in capsys.readouterr().err
    assert run(monkeypatch, "organism", "train", tmp_path / "new", "--tokens", 0) == 2
    assert not (tmp_path / "new").exists()


def test_texts_command_writes_what_the_curvature_commands_read(language, monkeypatch, tmp_path):
    lm = lirefs.load("organism")
    assert run(monkeypatch, "organism", "texts", tmp_path) == 0
    assert run(monkeypatch, "organism", "texts", tmp_path) == 2  # finished
    task = lirefs.recitation_task(lm, tmp_path / "planted.jsonl")
    items = language.items("planted", "test")
    assert [prefix for _, prefix, _ in task.items] == lm.encode([one.prompt for one in items])
    rows = [row for _, row in lirefs.files.read_jsonl(tmp_path / "labelled.jsonl")]
    shown = {f"{one.text}." for one in language.items("tale", "test")}
    assert all((row["label"] == "memorized") == (row["text"] in shown) for row in rows)
    assert len({row["text"] for row in rows}) == len(rows)
    shipped = Path(lirefs.__file__).parent / "data" / "organism_questions.jsonl"
    assert (tmp_path / "questions.jsonl").read_bytes() == shipped.read_bytes()
    assert list(lirefs.load_questions("organism")) == list(organism_questions("passage", language))
