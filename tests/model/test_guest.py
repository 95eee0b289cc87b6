from __future__ import annotations

import pytest
import torch
from torch import nn

from lirefs.model.guest import evaluating


def test_evaluating_restores_after_an_error():
    model = nn.Sequential(nn.Dropout(), nn.Linear(2, 2).eval())

    def fail():
        with evaluating(model):
            assert not model[0].training
            assert not torch.is_grad_enabled()
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert model[0].training
    assert not model[1].training
    assert torch.is_grad_enabled()
