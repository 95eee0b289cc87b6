"""Passes that begin above what an intervention changes give the same numbers, bit for bit."""

from contextlib import ExitStack, nullcontext
from types import SimpleNamespace

import pytest
import torch
from passes import counted
from recurrent import recurrent_model
from tiny import FAMILIES, fresh_model, tiny_tokenizer

import kfac
import lirefs
from lirefs.model.intervention import applied
from lirefs.model.language_model import wrap
from lirefs.tasks.batches import lower_blocks
from lirefs.tasks.batches.lower_blocks import LowerBlocks, first_changed
from lirefs.tasks.inference import greedy, score_continuations, token_nlls

FEW_SHOT = "a long beginning that every prompt shares: "


def steer_at(lm, layer, strength=1.0, **options):
    vector = torch.randn(lm.width, generator=torch.Generator().manual_seed(layer))
    return lirefs.Steer(lirefs.Direction(vector, layer), "add", strength, **options)


def variants_of(lm):
    name = kfac.find_targets(lm.model, layers=[2])[0].name
    edit = kfac.SVDEdit([name], 0.5)
    steer, early = steer_at(lm, 3), steer_at(lm, 1)
    return {"edit": edit, "steer": steer, "both": edit + steer, "early": early, "none": None}


def numbers(lm, shared=""):
    """Every way in which a model is asked."""
    prompts = lm.encode([f"{shared}{i}" + "?" * (i % 3) for i in range(5)])
    options = lm.encode(["ab", "n", "x"])
    return (
        greedy(lm, prompts, [4, 4, 1, 2, 4]),
        score_continuations(lm, [(prompt, options) for prompt in prompts]),
        [one.tolist() for one in token_nlls(lm, prompts)],
    )


@pytest.fixture
def lm():
    return wrap(fresh_model("llama"), tiny_tokenizer())


def test_the_first_block_that_is_changed(lm):
    found = {}
    variants = variants_of(lm)
    gate = lirefs.Gate(variants["early"].directions[0], 0.0)

    class Own:
        def attach(self, model):
            return model.register_forward_hook(lambda *_: None)

        def describe(self):
            return {"kind": "own"}

    others = {
        "everywhere": steer_at(lm, 3, layers="all"),
        "two layers": steer_at(lm, 3, layers=[1, 2]),
        "idle": steer_at(lm, 1, 0.0),
        "gated": steer_at(lm, 3, gate=gate),
        "own": Own(),
        "prompt": lirefs.Prompted("Read: "),
        "prompt and steer": lirefs.compose(lirefs.Prompted("Read: "), steer_at(lm, 3)),
    }
    for name, one in {**variants, **others}.items():
        with lirefs.compose(one).apply(lm.model) if one else nullcontext():
            found[name] = first_changed(lm, one)
    assert found == {
        "edit": 2, "steer": 3, "both": 2, "early": 1, "none": 4, "everywhere": 0, "two layers": 1,
        "idle": 4, "gated": 0, "own": 0, "prompt": 0, "prompt and steer": 0,
    }  # fmt: skip


def test_a_block_that_shares_a_changed_weight_counts(lm):
    first, last = (lm.layout.block(lm.model, layer).mlp.up_proj for layer in (0, 3))
    last.weight = first.weight
    edit = kfac.SVDEdit([kfac.find_targets(lm.model, layers=[3])[0].name], 0.5)
    with edit.apply(lm.model):
        assert first_changed(lm, edit) in (0, 3)
    names = [one.name for one in kfac.find_targets(lm.model, layers=[3], projections=["up_proj"])]
    with kfac.SVDEdit(names, 0.5).apply(lm.model):
        assert first_changed(lm, kfac.SVDEdit(names, 0.5)) == 0


@pytest.mark.parametrize("shared", ["", FEW_SHOT])
@pytest.mark.parametrize("family", [*FAMILIES, "mamba", "rwkv"])
def test_numbers_are_those_of_whole_passes(family, shared):
    recurrent = family in ("mamba", "rwkv")
    lm = wrap(recurrent_model(family) if recurrent else fresh_model(family), tiny_tokenizer())
    variants = {f"steer {at}": steer_at(lm, at) for at in range(1, lm.n_layers)}
    variants["scoped"] = steer_at(lm, lm.n_layers - 1, 4.0, scope="generated")
    lower = LowerBlocks(lm)
    for one in variants.values():
        with one.apply(lm.model):
            lower.expect(one)
    with lower.under(None):
        unchanged = numbers(lm, shared)
    assert unchanged == numbers(lm, shared)
    for _ in range(2):
        for one in variants.values():
            with one.apply(lm.model):
                whole = numbers(lm, shared)
                with lower.under(one):
                    assert numbers(lm, shared) == whole
            assert whole != unchanged
    for layer in range(lm.n_layers):
        assert "forward" not in vars(lm.layout.block(lm.model, layer))


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "qwen3"])
def test_prompts_run_through_lower_blocks_once(family):
    lm = wrap(fresh_model(family), tiny_tokenizer())
    steers = [steer_at(lm, 2, strength) for strength in (1.0, 2.0, 3.0)]
    lower, passes = LowerBlocks(lm), []
    numbers(lm)  # finds out how the model can be run
    with steers[0].apply(lm.model):
        lower.expect(steers[0])
    for one in (None, *steers):
        with counted(lm, 1) as tokens, applied(one, lm.model), lower.under(one):
            numbers(lm)
        passes.append([n for n in tokens if n > 3])
    assert list(map(len, passes[:2])) == [3, 2]  # recorded, and proved once for each kind
    assert passes[2:] == [[], []]


def test_what_was_recorded_under_one_variant_serves_another(lm):
    """A comparison that is resumed may have no pass of the unchanged model to record."""
    late, later = steer_at(lm, 2), steer_at(lm, 3)
    lower = LowerBlocks(lm)
    for one in (late, later, late, later):
        with one.apply(lm.model):
            whole = numbers(lm)
            with lower.under(one):
                assert numbers(lm) == whole


@pytest.mark.parametrize(
    ("texts", "variants", "proofs"),
    [(1, 1, 0), (2, 1, 0), (3, 1, 1), (9, 1, 1), (1, 2, 0), (1, 3, 1)],
)
def test_a_shallow_change_is_proved_where_it_can_pay(lm, texts, variants, proofs):
    steer = steer_at(lm, 1)  # of four blocks: three batches skip as much as one pass above it
    batches = [[[5 + text, *range(3, 9)]] for text in range(texts)]
    lower = LowerBlocks(lm)
    for _ in range(variants):
        with steer.apply(lm.model):
            lower.expect(steer)
    with steer.apply(lm.model), lower.under(steer):
        first = [token_nlls(lm, one)[0].tolist() for one in batches]
        with counted(lm, 3) as passes:
            again = [token_nlls(lm, one)[0].tolist() for one in batches]
        assert len(passes) == texts + proofs
        with counted(lm, 0) as passes:
            assert [token_nlls(lm, one)[0].tolist() for one in batches] == first == again
    assert len(passes) == (0 if proofs else texts)


def test_a_full_memory_keeps_no_more(lm, monkeypatch):
    monkeypatch.setattr(lower_blocks, "free_bytes", lambda device: 0)
    lower, steer = LowerBlocks(lm), steer_at(lm, 2)
    with steer.apply(lm.model), counted(lm, 0) as passes, lower.under(steer):
        first = numbers(lm)
        before = len(passes)
        assert numbers(lm) == first
    assert len(passes) == 2 * before


def failing(*_):
    raise KeyError("shared keys")


@pytest.mark.parametrize(
    ("name", "other"),
    [("with_hidden", lambda output, hidden: 2 * hidden), ("hidden_input", failing)],
)
def test_blocks_that_hand_on_more_run_every_time(lm, monkeypatch, name, other):
    """Where a pass that begins later gives other numbers, or an error, none begins later."""
    lower, steer = LowerBlocks(lm), steer_at(lm, 3)
    with steer.apply(lm.model):
        right = numbers(lm)
        monkeypatch.setattr(lower_blocks, name, other)
        with lower.under(steer), counted(lm, 0) as passes:
            found = [numbers(lm) for _ in range(3)]
    assert found == [right] * 3
    assert set(lower._proved.values()) == {False}
    assert len([n for n in passes if n > 3]) >= 9


@pytest.mark.parametrize("what", ["forward", "hook", "hook inside"])
def test_blocks_that_somebody_looks_at_run_every_time(lm, monkeypatch, what):
    lower, steer, seen = LowerBlocks(lm), steer_at(lm, 3), []
    block = lm.layout.block(lm.model, 1)
    if what == "forward":  # as accelerate's hooks do
        monkeypatch.setattr(block, "forward", block.forward)
    else:
        watched = block if what == "hook" else block.mlp
        watched.register_forward_hook(lambda *_: seen.append(1))
    with steer.apply(lm.model), lower.under(steer), counted(lm, 0) as passes:
        first = numbers(lm)
        before, ran = len(passes), len(seen)
        assert numbers(lm) == first
    assert (len(passes), len(seen)) == (2 * before, 2 * ran)


def test_beginnings_of_equal_length_are_told_apart(lm):
    lower, steer = LowerBlocks(lm), steer_at(lm, 3)
    beginnings = [FEW_SHOT, FEW_SHOT[::-1], FEW_SHOT]
    with steer.apply(lm.model):
        whole = [numbers(lm, shared) for shared in beginnings]
        with lower.under(steer):
            assert [numbers(lm, shared) for shared in beginnings] == whole
    assert whole[0] != whole[1]


def test_another_model_that_reads_the_same_is_not_mixed_up(lm):
    """A task may ask a model of its own, a judge for example."""
    judge = wrap(fresh_model("llama", rms_norm_eps=0.5), tiny_tokenizer())
    lower, steer, right = LowerBlocks(lm), steer_at(lm, 3), numbers(judge)
    with steer.apply(lm.model), lower.under(steer):
        for _ in range(2):
            numbers(lm)
            assert numbers(judge) == right
    assert right != numbers(lm)


@pytest.mark.parametrize("layer", [0, 2])
@pytest.mark.parametrize("how", ["edit", "in place", "embedding", "steering"])
def test_what_a_task_changes_itself_is_seen(lm, how, layer):
    steer, weight = steer_at(lm, 3), lm.layout.block(lm.model, layer).mlp.up_proj.weight
    with steer.apply(lm.model):
        lower, before = LowerBlocks(lm), numbers(lm)
        with lower.under(steer):
            for _ in range(2):
                assert numbers(lm) == before
            with ExitStack() as stack:
                if how == "edit":
                    edit = kfac.SVDEdit([kfac.find_targets(lm.model, [layer])[0].name], 0.2)
                    stack.enter_context(edit.apply(lm.model))
                elif how == "steering":
                    stack.enter_context(steer_at(lm, layer, 3.0).apply(lm.model))
                else:
                    one = weight if how == "in place" else lm.model.get_input_embeddings().weight
                    with torch.no_grad():
                        one.mul_(2)
                    stack.callback(one.data.div_, 2)
                changed = numbers(lm)
                assert changed != before
            assert numbers(lm) == before


def test_an_unknown_cache_is_not_kept(lm):
    output = SimpleNamespace(past_key_values=SimpleNamespace(layers=[object()] * 4))
    lower = LowerBlocks(lm)
    known = lower_blocks._Known()
    assert lower._recorded([2], known, lambda: output) is output
    assert not known.outputs


def test_a_comparison_gives_the_numbers_of_single_runs(lm, tmp_path):
    rows = [(f"{i}", f"{FEW_SHOT}{i}" + "?" * (i % 3), "yes") for i in range(6)]
    tasks = [
        lirefs.ShortAnswer("answers", rows),
        lirefs.Perplexity("texts", [text for _, text, _ in rows]),
        lirefs.MultipleChoice("choices", [(i, text, (" a", " bc"), 0) for i, text, _ in rows]),
    ]
    variants = {name: one for name, one in variants_of(lm).items() if one is not None}
    with counted(lm, 0) as together:
        found = lirefs.compare(lm, variants, tasks, progress=False)
    with counted(lm, 0) as apart:
        for name, one in variants.items():
            alone = lirefs.compare(lm, {name: one}, tasks, progress=False)
            assert alone.results[name] == found.results[name]
    with counted(lm, 0) as plain:
        for name, one in variants.items():
            with one.apply(lm.model):
                again = {task.name: task.run(lm, lambda n: None) for task in tasks}
            assert again == found.results[name]
    assert sum(together) < sum(plain) < sum(apart)


def test_a_task_of_a_users_own_may_change_the_model(lm):
    class Edited(lirefs.ShortAnswer):
        def run(self, lm, advance):
            weight = lm.layout.block(lm.model, 0).mlp.up_proj.weight.data
            kept = weight.clone()
            weight.mul_(-1)
            try:
                return super().run(lm, advance)
            finally:
                weight.copy_(kept)

    rows = [(f"{i}", f"{i}" + "?" * (i % 3), "yes") for i in range(6)]
    plain, edited = lirefs.ShortAnswer("plain", rows), Edited("edited", rows)
    variants = {f"{strength}": steer_at(lm, 3, strength) for strength in (1.0, 2.0)}
    found = lirefs.compare(lm, variants, [plain, edited], progress=False)
    for name, one in variants.items():
        with one.apply(lm.model):
            assert edited.run(lm, lambda n: None) == found.results[name]["edited"]
        assert found.results[name]["edited"] != found.results[name]["plain"]
