"""The tiny models of `families.py` are good subjects: causal, and every earlier token matters."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from families import CORE, FAMILIES, KINDS, LEFT_OUT, NOT_CAUSAL, build
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from lirefs.model.guest import accepts

IDS = 5 * torch.arange(20) % 90 + 5


def logits(model: Any, changes: dict[int, int]) -> torch.Tensor:
    """Logits of `IDS` after the changes, (20, vocabulary)."""
    ids = IDS.clone()
    for position, token in changes.items():
        ids[position] = token
    extra = {"use_cache": False} if accepts(model, "use_cache") else {}
    with torch.no_grad():
        return model(input_ids=ids[None], **extra).logits[0].double()


def effect(model: Any, changes: dict[int, int]) -> torch.Tensor:
    """How much the changes move the logits of each position, in their standard deviations."""
    plain = logits(model, {})
    return (logits(model, changes) - plain).abs().amax(-1) / plain[-1].std()


def check(name: str) -> None:
    model = build(name)
    plain = logits(model, {})
    assert plain.shape == (20, 128)
    assert plain.isfinite().all()
    assert not model.training
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert effect(model, {0: 77})[-1] > 1e-2, "the first token does not matter"
    assert effect(model, {8: int(IDS[9]), 9: int(IDS[8])})[-1] > 1e-2, "order does not matter"
    assert effect(model, {19: 77})[:-1].max() < 1e-5, "a later token matters"


@pytest.mark.parametrize("name", CORE)
def test_core(name: str) -> None:
    check(name)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in FAMILIES if name not in CORE])
def test_others(name: str) -> None:
    check(name)


@pytest.mark.slow
@pytest.mark.parametrize("name", NOT_CAUSAL)
def test_not_causal(name: str) -> None:
    assert effect(build(name), {19: 77})[:-1].max() > 1e-4


def test_core_has_every_kind() -> None:
    assert len(set(CORE)) == 20
    assert {FAMILIES[name].kind for name in CORE} == set(KINDS)


def test_every_model_type_is_accounted_for() -> None:
    known = {family.model_type for family in FAMILIES.values()}
    assert not known & set(LEFT_OUT)
    assert set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES) <= known | set(LEFT_OUT)


def test_each_build_is_new_and_the_same() -> None:
    one, other = build("lfm2"), build("lfm2")
    assert one is not other
    for left, right in zip(one.parameters(), other.parameters()):
        assert torch.equal(left, right)
