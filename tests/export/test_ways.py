import pytest
import torch
from tiny import fresh_model, tiny_tokenizer

from lirefs import Direction, Steer, wrap
from lirefs.errors import BackendError, BakeError
from lirefs.export import bake, to_gguf, ways
from lirefs.steering import scope

EVERYWHERE = ("resid_pre", "attn_out", "resid_post")
HOOKS, LENS, SIGHT, VLLM = "transformers hooks", "TransformerLens", "nnsight", "vLLM"
VECTOR, BAKED = "llama.cpp control vector", "baked weights"
EVERY = [HOOKS, LENS, SIGHT, VLLM, VECTOR, BAKED]


def direction(layer=2, site="resid_post", width=32):
    generator = torch.Generator().manual_seed(0)
    return Direction(torch.randn(width, generator=generator), layer, site)


def able(found):
    return [one.runtime for one in found if one.possible]


@pytest.mark.parametrize(
    ("family", "steer", "expected"),
    [
        ("llama", Steer(direction(), "add"), EVERY),
        ("qwen3", Steer(direction(), "add"), [HOOKS, LENS, SIGHT, VLLM, VECTOR]),
        ("qwen3", Steer(direction(), "ablate", layers="all", sites=EVERYWHERE),
         [HOOKS, LENS, SIGHT, VLLM, BAKED]),
        ("llama", Steer(direction(), "amplify", 0.5), [HOOKS, LENS, SIGHT, VLLM]),
        ("llama", Steer(direction(), "add", scope="prompt"), [HOOKS, VLLM]),
        ("llama", Steer(direction(), "add", scope=scope.from_position(2)), [HOOKS, VLLM]),
        ("llama", Steer(direction(), "add", [1.0, None]), [HOOKS]),
        ("llama", Steer(direction(width=16), "add"), []),
    ],
)  # fmt: skip
def test_each_runtime_is_asked_by_its_own_check(family, steer, expected):
    lm = wrap(fresh_model(family), tiny_tokenizer())
    found = ways(lm, steer)
    assert [one.runtime for one in found] == EVERY
    assert able(found) == expected
    assert all(one.exact == one.possible == (not one.reason) for one in found)


def test_the_reasons_are_those_of_the_exporters(lm, tmp_path):
    reasons = {one.runtime: one.reason for one in ways(lm, Steer(direction(), "amplify", 0.5))}
    with pytest.raises(BackendError) as refused:
        to_gguf(Steer(direction(), "amplify", 0.5), tmp_path / "c.gguf", lm)
    assert reasons[VECTOR] == str(refused.value)
    with pytest.raises(BakeError, match="earlier layers wrote") as refused:
        bake(Steer(direction(), "amplify", 0.5), lm.model)
    assert str(refused.value).startswith(reasons[BAKED])


def test_nothing_is_copied_and_a_notebook_shows_a_table(lm, monkeypatch):
    monkeypatch.setattr(type(lm.model), "__deepcopy__", None, raising=False)
    found = ways(lm, Steer(direction(), "add"))
    assert able(found) == EVERY
    assert repr(found).count("\n") == len(EVERY) - 1
    assert "llama-server -m MODEL.gguf --control-vector c.gguf" in repr(found)
    assert "<table" in found._repr_html_()
    for wrong in ((lm.model, Steer(direction(), "add")), (lm, direction())):
        with pytest.raises(BackendError):
            ways(*wrong)
