"""Engines of vLLM compute what hooks compute; started here, in the environment of .ci/vllm."""

import contextlib
import functools
import gc
import os
import sys
from pathlib import Path

import pytest
import torch
from families import FAMILIES
from tiny import build, fresh_model, tiny_tokenizer

import lirefs
from lirefs import Direction, ShortAnswer, Steer, compare, wrap
from lirefs.errors import BackendError
from lirefs.export import vllm as ours
from lirefs.steering import scope as scopes

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))
import parity  # noqa: E402

pytestmark = pytest.mark.vllm
CLOSE = 1e-3


@contextlib.contextmanager
def engine(folder, **settings):
    """A small engine, ended on exit."""
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    from vllm import LLM

    small = {"dtype": "float32", "max_model_len": 128, "max_num_seqs": 8, "max_logprobs": -1}
    llm = LLM(str(folder), **small | dict(ours.OPTIONS) | settings)
    try:
        yield llm
    finally:
        llm.llm_engine.engine_core.shutdown()
        del llm
        gc.collect()


@pytest.fixture(scope="module")
def organism(tmp_path_factory):
    lm = lirefs.load("organism")
    return lm, parity.save(lm, tmp_path_factory.mktemp("organism"))


@pytest.fixture(scope="module")
def chunked(organism):
    """An engine that takes prompts in chunks of 16 tokens, and keeps no prefixes."""
    lm, folder = organism
    settings = {"max_num_batched_tokens": 16, "enable_prefix_caching": False}
    with engine(folder, **settings) as llm:
        yield lm, llm


@pytest.fixture(scope="module")
def caching(organism):
    """An engine that keeps prefixes, and takes prompts whole."""
    lm, folder = organism
    settings = {"enable_chunked_prefill": False, "enable_prefix_caching": True, "block_size": 32}
    with engine(folder, **settings) as llm:
        yield lm, llm


def direction(lm, site="resid_pre"):
    vector = parity.steerings(lm)["add, all"].directions[0].vector
    return Direction(vector, lm.n_layers // 2, site)


def agrees(lm, llm, steer):
    expected = parity.hooks(lm, steer)
    with ours.steered(llm, steer) if steer is not None else contextlib.nullcontext():
        found = parity.generated_by(llm, lm)
    assert found.tokens == expected.tokens
    assert found.difference(expected) <= CLOSE


OPERATORS = {"add": 1.0, "ablate": 1.0, "amplify": 2.0, "clamp": 3.0}
SITES = ["resid_pre", "attn_out", "mlp_out", "resid_post"]
SCOPES = ["all", "prompt", "generated", "last_prompt_token"]
SCOPES += [scopes.first_generated(2), scopes.from_position(7)]


@pytest.mark.parametrize("scope", SCOPES, ids=str)
@pytest.mark.parametrize("site", SITES)
@pytest.mark.parametrize("operator", OPERATORS)
def test_operators_sites_and_scopes(chunked, operator, site, scope):
    lm, llm = chunked
    agrees(lm, llm, Steer(direction(lm, site), operator, OPERATORS[operator], scope=scope))


@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize("scope", ["all", scopes.from_position(7)], ids=str)
def test_with_cached_prefixes(caching, monkeypatch, operator, scope):
    lm, llm = caching
    # A block of the cache has 32 tokens or more.
    monkeypatch.setattr(parity, "PROMPTS", [" ".join(2 * [one]) for one in parity.PROMPTS[1:2]])
    agrees(lm, llm, None)
    assert cached(lm, llm) > 0  # the prompt, unsteered
    steer = Steer(direction(lm), operator, OPERATORS[operator], scope=scope)
    expected = parity.hooks(lm, steer)
    with ours.steered(llm, steer):
        assert cached(lm, llm) == 0
        assert cached(lm, llm) > 0  # the prompt, steered
        found = parity.generated_by(llm, lm)
    assert found.tokens == expected.tokens
    assert found.difference(expected) <= CLOSE
    assert cached(lm, llm) == 0
    agrees(lm, llm, None)


def cached(lm, llm):
    """Tokens of the prompt that the engine does not compute again."""
    from vllm import SamplingParams

    given = [{"prompt_token_ids": ids} for ids in lm.encode(parity.PROMPTS)]
    found = llm.generate(given, SamplingParams(max_tokens=1), use_tqdm=False)
    return found[0].num_cached_tokens


def test_scopes_that_a_cached_prefix_would_break(caching):
    lm, llm = caching
    for scope in ("prompt", "generated", "last_prompt_token", scopes.first_generated(2)):
        steer = Steer(direction(lm), "add", scope=scope)
        with pytest.raises(BackendError, match="enable_prefix_caching=False"):
            ours.steered(llm, steer).__enter__()
    agrees(lm, llm, None)


def test_compositions_and_nested_steerings(chunked):
    lm, llm = chunked
    one = Steer(direction(lm), "add", 1.0)
    two = Steer(direction(lm, "resid_post"), "clamp", 3.0, scope="generated")
    agrees(lm, llm, one + two)
    with ours.steered(llm, one), ours.steered(llm, two):
        found = parity.generated_by(llm, lm)
    assert found.difference(parity.hooks(lm, one + two)) <= CLOSE
    agrees(lm, llm, None)


def test_nothing_is_left_after_an_error(chunked):
    lm, llm = chunked
    with pytest.raises(ZeroDivisionError), ours.steered(llm, Steer(direction(lm), "add")):
        raise ZeroDivisionError
    agrees(lm, llm, None)


def test_a_direction_of_another_width_or_layer(chunked):
    lm, llm = chunked
    for wrong in (Direction(torch.ones(8), 1), Direction(torch.ones(lm.width), 40)):
        with pytest.raises(lirefs.errors.InterventionError, match=r"width|does not exist"):
            ours.steered(llm, Steer(wrong, "add")).__enter__()
    agrees(lm, llm, None)


def test_an_engine_of_another_model(chunked):
    lm, llm = chunked
    ours.Engine(llm).check(lm)
    other = wrap(fresh_model("llama"), tiny_tokenizer(), name="another")
    with pytest.raises(BackendError, match="which is not another"):
        ours.Engine(llm).check(other)
    changed = lirefs.load("organism")
    with torch.no_grad():
        changed.model.get_submodule(changed.layout.final_norm).weight += 0.1
    with pytest.raises(BackendError, match="which is not organism"):
        ours.Engine(llm).check(changed)


def test_a_comparison_has_the_scores_of_transformers(chunked):
    lm, llm = chunked
    items = lirefs.organism.Language().items("conflict", "test", 24)
    rows = [(item.prompt, item.prompt, item.answer) for item in items]
    task = ShortAnswer("conflicts", rows, max_new_tokens=4)
    found = lirefs.fit(lm, lirefs.load_questions("organism"), layers=[1], progress=False).best
    variants = {
        "read": Steer(found, "add", 2.0),
        "recall": Steer(found, "add", -2.0, scope="prompt"),
        "ablated": Steer(found, "ablate"),
    }
    on_engine = compare(lm, variants, [task], progress=False, engine=ours.Engine(llm))
    own = compare(lm, variants, [task], progress=False)
    for variant in ("unchanged", *variants):
        assert on_engine.results[variant] == own.results[variant]
    values = {str(own.cell(variant, "conflicts").value) for variant in own.variants}
    assert len(values) > 1


def test_a_compiled_engine_is_refused(organism):
    lm, folder = organism
    config = {"compilation_config": {"mode": 0}, "enforce_eager": False}
    with engine(folder, **config) as llm, pytest.raises(BackendError, match="enforce_eager=True"):
        ours.steered(llm, Steer(direction(lm), "add")).__enter__()


def test_plain_workers_are_refused(organism):
    lm, folder = organism
    with (
        engine(folder, worker_cls="auto") as llm,
        pytest.raises(BackendError, match=r"lirefs\.export\.vllm_worker\.Worker"),
    ):
        ours.steered(llm, Steer(direction(lm), "add")).__enter__()


def test_workers_that_share_each_layer(organism, monkeypatch):
    lm, folder = organism
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0|1")
    settings = {"tensor_parallel_size": 2, "enable_prefix_caching": False}
    with engine(folder, **settings) as llm:
        for steer in parity.steerings(lm).values():
            agrees(lm, llm, steer)


COMPARED = ["llama", "phi3", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text"]
COMPARED += ["glm4", "granite", "mixtral", "qwen3_moe", "gpt2", "gpt_neox", "olmo2", "opt"]
ABSENT = {"granite": ("attn_out", "mlp_out")}


def one_head(family):
    """A tiny model whose heads are as wide as vLLM's attention on the CPU needs them."""
    config = FAMILIES[family].config()
    heads = {"n_head": 1, "num_attention_heads": 1, "num_key_value_heads": 1, "head_dim": 32}
    # transformers' default attention has no caps, and vLLM's has.
    for name, value in (heads | {"attn_logit_softcapping": None}).items():
        if name in config.to_dict():
            setattr(config, name, value)
    return build(config)


@pytest.mark.parametrize("family", COMPARED)
def test_families(tmp_path, monkeypatch, family):
    lm = wrap(one_head(family), tiny_tokenizer(), name=f"tiny-{family}")
    folder = parity.save(lm, tmp_path)
    monkeypatch.setattr(parity, "PROMPTS", ["Q: how many\nA: ", "a text of some length", "b"])
    with engine(folder, enable_prefix_caching=False) as llm:
        agrees(lm, llm, None)
        for site in SITES:
            steer = Steer(direction(lm, site), "clamp", 5.0)
            if site in ABSENT.get(family, ()):
                with pytest.raises(BackendError, match=f"no module that gives {site}"):
                    ours.steered(llm, steer).__enter__()
            else:
                agrees(lm, llm, steer)
        agrees(lm, llm, Steer(direction(lm), "add", layers="all", scope="prompt"))


@functools.cache
def smollm2():
    return lirefs.load("smollm2-135m")


@pytest.mark.weights
def test_smollm2(tmp_path):
    lm = smollm2()
    settings = {"max_num_batched_tokens": 16, "enable_prefix_caching": False}
    with engine(parity.save(lm, tmp_path), **settings) as llm:
        for steer in parity.steerings(lm).values():
            agrees(lm, llm, steer)
