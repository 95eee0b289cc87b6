"""The tiny models of `families.py` are good subjects: causal, and every earlier token matters."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from families import CORE, FAMILIES, KINDS, LEFT_OUT, build
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from lirefs.model.guest import accepts

OTHERS = [name for name in FAMILIES if name not in CORE]
IDS = 5 * torch.arange(20) % 90 + 5


def logits(model: Any, changes: dict[int, int]) -> torch.Tensor:
    """Logits of `IDS` after the changes, in units of the spread of the last ones."""
    ids = IDS.clone()
    for position, token in changes.items():
        ids[position] = token
    extra = {"use_cache": False} if accepts(model, "use_cache") else {}
    with torch.no_grad():
        found = model(input_ids=ids[None], **extra).logits[0].double()
    return found / found[-1].std()


def check(name: str) -> None:
    model = build(name)
    assert not model.training
    plain = logits(model, {})
    assert plain.shape == (20, 128)
    assert plain.isfinite().all()
    swapped = {8: int(IDS[9]), 9: int(IDS[8])}
    for change in ({0: 77}, swapped):
        assert (logits(model, change)[-1] - plain[-1]).abs().max() > 1e-2, change
    scale = (logits(model, {19: 77})[:-1] / plain[:-1]).median()
    later = logits(model, {19: 77})[:-1] / scale
    assert torch.allclose(later, plain[:-1], atol=1e-4), "a later token changes an earlier one"


@pytest.mark.parametrize("name", CORE)
def test_core(name: str) -> None:
    check(name)


@pytest.mark.slow
@pytest.mark.parametrize("name", OTHERS)
def test_others(name: str) -> None:
    check(name)


def test_core_has_every_kind() -> None:
    assert len(CORE) == len(set(CORE)) == 20
    assert {FAMILIES[name].kind for name in CORE} == set(KINDS)


def test_every_name_is_accounted_for() -> None:
    known = {family.model_type for family in FAMILIES.values()}
    assert not known & set(LEFT_OUT)
    assert set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES) <= known | set(LEFT_OUT)


def test_same_seed_same_weights() -> None:
    one, other = build("lfm2"), build("lfm2")
    assert one is not other
    for left, right in zip(one.parameters(), other.parameters()):
        assert torch.equal(left, right)
