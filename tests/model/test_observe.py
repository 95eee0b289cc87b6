from __future__ import annotations

import pytest
import torch

from lirefs.errors import LayoutError
from lirefs.model.observe import hidden_input, hidden_of, with_hidden, with_hidden_input


def test_hidden_states_in_and_out_of_containers():
    h, new = torch.zeros(2, 3, 4), torch.ones(2, 3, 4)
    assert hidden_of(h) is h
    assert hidden_of((h, None)) is h
    assert hidden_of(h.view(6, 4), batch=2).shape == (2, 3, 4)
    assert with_hidden(h, new) is not h
    assert with_hidden((h, "cache"), new)[1] == "cache"
    assert isinstance(with_hidden([h, 1], new), list)
    assert with_hidden(h.view(6, 4), new).shape == (6, 4)
    assert hidden_input((h, 1), {}) is h
    assert hidden_input((), {"hidden_states": h}) is h
    assert with_hidden_input((h, 1), {"a": 2}, new) == ((new, 1), {"a": 2})
    assert with_hidden_input((), {"hidden_states": h}, new)[1]["hidden_states"] is new
    with pytest.raises(LayoutError, match="NoneType"):
        hidden_input((), {})
