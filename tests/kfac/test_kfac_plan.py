import pytest
import torch
from curvature_tools import batch, collect, llama

import kfac
from lirefs.errors import BudgetError, TargetError


@pytest.fixture(scope="module")
def model():
    return llama()


@pytest.mark.parametrize("marginals", [False, True])
@pytest.mark.parametrize("diagonal", [False, True])
def test_the_plan_is_what_is_used(model, marginals, diagonal):
    targets = kfac.find_targets(model, projections=["gate_proj", "up_proj", "q_proj", "v_proj"])
    options = {"marginals": marginals, "diagonal": diagonal}
    factors = collect(model, [batch([0])], targets, dtype=None, **options)
    used = sum(table.numel() * table.element_size() for table in factors.sums.values())
    assert kfac.plan(targets, **options).total == used


def test_double_needs_twice(model):
    targets = kfac.find_targets(model)
    one, two = (kfac.plan(targets, dtype=dtype) for dtype in (torch.float32, torch.float64))
    assert two.total == 2 * one.total
    assert "1 pass" in str(one)


def test_budget_splits_targets_and_keeps_kin_together(model):
    targets = kfac.find_targets(model, projections=["gate_proj", "up_proj", "down_proj"])
    budget = kfac.plan(targets[:2]).total
    layout = kfac.plan(targets, budget)
    assert max(layout.bytes) <= budget
    assert sum(layout.bytes) == layout.total == kfac.plan(targets).total
    assert [t.name for group in layout.passes for t in group] == [t.name for t in targets]
    assert [t.name.split(".")[-1] for t in layout.passes[0]] == ["gate_proj", "up_proj"]
    assert f"{len(layout.passes)} passes" in str(layout)


def test_a_budget_too_small_is_named_before_work(model):
    targets = kfac.find_targets(model)

    def batches():
        raise AssertionError("work was begun")
        yield

    with pytest.raises(BudgetError, match=r"gate_proj and model.*up_proj need .* budget of 10 B"):
        collect(model, batches(), targets, budget=10)
    with pytest.raises(TargetError, match="no targets"):
        kfac.plan([])


def test_the_plan_is_shown_with_the_progress(model, capsys):
    targets = kfac.find_targets(model)
    factors = kfac.collect(model, [batch([0])], targets)
    assert str(kfac.plan(targets)) in capsys.readouterr().err
    kfac.correct(model, [batch([0])], factors)
    assert str(kfac.plan(targets, dtype=factors.dtype, correction=True)) in capsys.readouterr().err
    kfac.correct(model, [batch([0])], factors, progress=False)
    assert not capsys.readouterr().err
