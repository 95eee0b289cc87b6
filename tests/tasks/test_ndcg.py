import math

import pytest
import torch
from scored import run
from tiny import fresh_model, tiny_tokenizer

import kfac
from lirefs import Direction, Steer, ndcg_task, wrap
from lirefs.errors import TaskError
from lirefs.tasks.ndcg import RankAgreement, ndcg


def ndcg_by_brute_force(base, edited):
    """Both definitions with plain loops in double precision."""
    k = len(base)
    ideal = sum((k - rank + 1) / math.log2(rank + 1) for rank in range(1, k + 1))
    usual = paper = 0.0
    for rank, token in enumerate(edited, start=1):
        if token in base:
            usual += (k - (base.index(token) + 1) + 1) / math.log2(rank + 1)
            paper += (k - rank + 1) / math.log2(rank + 1)
    return usual / ideal, paper / ideal


def test_ndcg_against_plain_loops_and_closed_forms():
    generator = torch.Generator().manual_seed(0)
    base = torch.stack([torch.randperm(15, generator=generator)[:10] for _ in range(50)])
    edited = torch.stack([torch.randperm(15, generator=generator)[:10] for _ in range(50)])
    found = ndcg(base, edited)
    for row in range(50):
        usual, paper = ndcg_by_brute_force(base[row].tolist(), edited[row].tolist())
        assert float(found["ndcg"][row]) == pytest.approx(usual, abs=1e-12)
        assert float(found["ndcg_paper"][row]) == pytest.approx(paper, abs=1e-12)
    same = ndcg(base, base)
    assert torch.allclose(same["ndcg"], torch.ones(50, dtype=torch.float64), atol=1e-12)
    reverse = ndcg(base, base.flip(1))
    assert float(reverse["ndcg"][0]) == pytest.approx(0.668, abs=5e-4)
    assert float(reverse["ndcg_paper"][0]) == pytest.approx(1, abs=1e-12)
    assert ndcg(base, base + 100)["ndcg_paper"].sum() == 0


def test_ndcg_task_freezes_the_unchanged_model(lm):
    texts = [("short", "ab"), ("long", "a much longer text than the first"), ("cut", "y" * 60)]
    task = ndcg_task(lm, texts, k=5, max_tokens=20)
    assert [len(ids) for _, ids, _ in task.items] == [3, 20, 20]
    for _, ids, frozen in task.items:
        with torch.no_grad():
            logits = lm.model(torch.tensor([ids])).logits[0]
        assert [list(row) for row in frozen] == logits.sort(descending=True).indices[:, :5].tolist()
    for result, (_, ids, _) in zip(run(task, lm), task.items):
        assert result.scores["ndcg"] == pytest.approx(1, abs=1e-12)
        assert result.weight == len(ids)
    steer = Steer(
        Direction(torch.randn(32, generator=torch.Generator().manual_seed(0)), 1), "add", 3.0
    )
    with steer.apply(lm.model):
        moved = run(task, lm)
        for result, (_, ids, frozen) in zip(moved, task.items):
            with torch.no_grad():
                order = lm.model(torch.tensor([ids])).logits[0].sort(descending=True).indices
            pairs = [ndcg_by_brute_force(frozen[i], order[i, :5].tolist()) for i in range(len(ids))]
            usual, paper = (sum(column) / len(ids) for column in zip(*pairs))
            assert result.scores["ndcg"] == pytest.approx(usual, abs=1e-9)
            assert result.scores["ndcg_paper"] == pytest.approx(paper, abs=1e-9)
            assert result.scores["ndcg"] < 1
        # An item is scored from that item alone.
        assert task.subset([1]).run(lm, lambda n: None) == moved[1:2]
        with pytest.raises(TaskError, match="steered model cannot be the baseline"):
            ndcg_task(lm, texts)


def test_ndcg_task_refuses_what_is_no_baseline():
    lm = wrap(fresh_model("llama"), tiny_tokenizer())
    names = [target.name for target in kfac.find_targets(lm.model, layers=[1])]
    edit = kfac.SVDEdit(names, 0.5)
    with edit.apply(lm.model), pytest.raises(TaskError, match="under a weight edit"):
        ndcg_task(lm, [("a", "text")])
    ndcg_task(lm, [("a", "text")])
    with pytest.raises(TaskError, match="k is 129, expected 1 to 128"):
        ndcg_task(lm, [("a", "text")], k=129)
    with torch.no_grad():
        lm.model.get_output_embeddings().weight[5] = float("nan")
    with pytest.raises(TaskError, match="NaN"):
        ndcg_task(lm, [("a", "text")])
    with pytest.raises(TaskError, match="no items"):
        RankAgreement("n", [])
    with pytest.raises(TaskError, match="k tokens for each position"):
        RankAgreement("n", [("a", [1, 2], [[3, 4]])])
    bare = wrap(fresh_model("llama"), tiny_tokenizer(bos=False))
    with pytest.raises(TaskError, match="'a' is empty"):
        ndcg_task(bare, [("a", "")])
