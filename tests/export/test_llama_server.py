"""Control vectors and baked models in the real llama-server, which `.ci/llama` installs."""

import pytest
import torch
from llama_server import Answer, answer_of, converted, llama_server

import lirefs
from lirefs import Direction, Directions, Steer
from lirefs.export import bake, to_gguf

pytestmark = pytest.mark.llama
EVERYWHERE = ("resid_pre", "attn_out", "resid_post")
LENGTHS = {"organism": 3.0, "smollm2-135m": 20.0}
PROMPT = "Math: 31 + 27 ="


@pytest.fixture(
    scope="module",
    params=["organism", pytest.param("smollm2-135m", marks=pytest.mark.weights)],
)
def served(request, tmp_path_factory):
    """A model, its GGUF file, a prompt as token ids, and what the server answers unsteered."""
    lm = lirefs.load(request.param, device="cpu")
    file = converted(lm, tmp_path_factory.mktemp("gguf"))
    (ids,) = lm.encode([PROMPT])
    return lm, file, ids, asked(lm, file, ids)


def asked(lm, file, ids, *arguments) -> Answer:
    with llama_server(file, *arguments) as client:
        return client.ask(ids, lm.model.config.vocab_size)


def direction(lm, layer):
    vector = torch.randn(lm.width, generator=torch.Generator().manual_seed(layer))
    return Direction(LENGTHS[lm.name] * vector / vector.norm(), layer, "resid_post")


def agree(found: Answer, ours: Answer, found_plain: Answer, ours_plain: Answer) -> None:
    theirs, expected = (
        (one.logprobs - plain.logprobs).double()
        for one, plain in ((found, found_plain), (ours, ours_plain))
    )
    assert expected.abs().max() > 0.1
    assert torch.cosine_similarity(theirs, expected, dim=0) > 0.9999
    assert (found.logprobs - ours.logprobs).abs().max() < 2e-3
    assert found.tokens == ours.tokens


def test_the_model_itself_is_the_same(served):
    lm, _, ids, plain = served
    ours = answer_of(lm, ids)
    assert (plain.logprobs - ours.logprobs).abs().max() < 2e-3
    assert plain.tokens == ours.tokens


@pytest.mark.parametrize("many", [False, True], ids=["one layer", "every layer"])
def test_a_control_vector_does_what_the_hooks_do(served, tmp_path, many):
    lm, model, ids, plain = served
    layers = range(1, lm.n_layers) if many else [lm.n_layers // 2]
    found = Directions({(layer, "resid_post"): direction(lm, layer) for layer in layers})
    steer = Steer(found, "add", 0.5 if many else 1.0)
    to_gguf(steer, tmp_path / "c.gguf", lm)
    theirs = asked(lm, model, ids, "--control-vector", tmp_path / "c.gguf")
    agree(theirs, answer_of(lm, ids, steer), plain, answer_of(lm, ids))


def test_the_server_scales_a_control_vector(served, tmp_path):
    lm, model, ids, plain = served
    one = direction(lm, lm.n_layers // 2)
    to_gguf(one, tmp_path / "c.gguf", lm)
    theirs = asked(lm, model, ids, "--control-vector-scaled", f"{tmp_path / 'c.gguf'}:-1.5")
    agree(theirs, answer_of(lm, ids, Steer(one, "add", -1.5)), plain, answer_of(lm, ids))


def test_the_server_restricts_a_control_vector_to_layers_both_ends_included(served, tmp_path):
    lm, model, ids, plain = served
    found = {(layer, "resid_post"): direction(lm, layer) for layer in range(1, lm.n_layers)}
    to_gguf(Directions(found), tmp_path / "c.gguf", lm)
    kept = {place: one for place, one in found.items() if 1 <= place[0] <= 2}
    given = ("--control-vector", tmp_path / "c.gguf", "--control-vector-layer-range", "1", "2")
    theirs = asked(lm, model, ids, *given)
    agree(theirs, answer_of(lm, ids, Steer(Directions(kept), "add")), plain, answer_of(lm, ids))


@pytest.mark.parametrize("operator", ["add", "ablate"])
def test_a_baked_model_does_what_the_hooks_do(served, tmp_path, operator):
    lm, _, ids, plain = served
    one = direction(lm, lm.n_layers // 2)
    steer = Steer(one, "add")
    if operator == "ablate":
        steer = Steer(one, "ablate", layers="all", sites=EVERYWHERE)
    theirs = asked(lm, converted(lm, tmp_path, bake(steer, lm.model)), ids)
    agree(theirs, answer_of(lm, ids, steer), plain, answer_of(lm, ids))
