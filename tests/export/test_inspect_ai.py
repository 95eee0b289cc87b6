"""Models of inspect_ai: answers of a steered and an edited model, and what its log says of them."""

import pytest
import torch

import lirefs

pytest.importorskip(
    "inspect_ai",
    reason="inspect_ai needs an older fsspec than constraints.txt pins: an environment of its own",
)
from inspect_ai import Task, eval
from inspect_ai.dataset import Sample
from inspect_ai.model import GenerateConfig, get_model
from inspect_ai.scorer import includes
from inspect_ai.solver import generate, use_tools
from inspect_ai.tool import tool

from lirefs.export.inspect_ai import model

PROMPTS = ["Q: one", "Q: two, longer"]


@pytest.fixture
def steer(lm):
    direction = lirefs.Direction(
        torch.randn(lm.width, generator=torch.Generator().manual_seed(0)), 1, model=lm.fingerprint
    )
    return lirefs.Steer(direction, "add", 4.0)


@pytest.fixture
def evaluated(tmp_path):
    """The log of two prompts, each of which has the target "~"."""

    def run(lm, solver=None, **config):
        task = Task(
            dataset=[Sample(one, target="~") for one in PROMPTS],
            solver=solver or generate(),
            scorer=includes(),
        )
        (log,) = eval(task, model=lm, log_dir=str(tmp_path), display="none", max_tokens=6, **config)
        return log

    return run


def answers(log):
    assert log.status == "success", log.error
    return [sample.output.completion for sample in log.samples]


def test_answers_are_those_of_generate(lm, steer, evaluated):
    plain, changed = lm.generate(PROMPTS, 6), None
    with steer.apply(lm.model):
        changed = lm.generate(PROMPTS, 6)
    assert plain != changed
    assert answers(evaluated(model(lm))) == plain
    log = evaluated(model(lm, steer))
    assert answers(log) == changed
    assert lm.generate(PROMPTS, 6) == plain
    assert log.eval.model == "lirefs/tiny-llama"
    assert log.eval.model_args["intervention"]["operator"] == "add"
    output = log.samples[0].output
    assert (output.usage.input_tokens, output.usage.output_tokens) == (7, 6)
    assert output.stop_reason == "max_tokens"


def test_a_file_of_directions_steers_a_model_by_name(model_folder, evaluated, tmp_path):
    lm = lirefs.load(model_folder, device="cpu")
    one = lirefs.Direction(torch.arange(float(lm.width)), 2)
    file = tmp_path / "d.safetensors"
    lirefs.Directions({(2, "resid_pre"): one}, {"model": lm.fingerprint}).save(file)
    named = get_model(f"lirefs/{model_folder}", directions=str(file), operator="ablate")
    with lirefs.Steer(one, "ablate").apply(lm.model):
        assert answers(evaluated(named)) == lm.generate(PROMPTS, 6)


def test_settings_of_the_evaluation(lm, evaluated):
    plain = lm.generate(PROMPTS[0], 6)
    log = evaluated(model(lm), stop_seqs=[plain[2]])
    assert log.samples[0].output.completion == plain[:2]
    assert log.samples[0].output.stop_reason == "stop"
    sampled = [answers(evaluated(model(lm), temperature=5.0, seed=seed)) for seed in (1, 1, 2)]
    assert sampled[0] == sampled[1] != sampled[2]
    config = GenerateConfig(stop_seqs=[plain[1]])
    assert answers(evaluated(model(lm, config=config)))[0] == plain[:1]


def test_what_is_refused(lm, evaluated):
    log = evaluated(model(lm), logprobs=True)
    assert "do not support logprobs" in log.error.message

    @tool
    def clock():
        async def execute():
            """Tell the time."""
            return "noon"

        return execute

    log = evaluated(model(lm), solver=[use_tools(clock()), generate()])
    assert "call no tools" in log.error.message


def test_a_prompt_before_the_conversation_is_not_part_of_the_answer(lm, evaluated):
    asked = lirefs.Prompted("say: ")
    with asked.apply(lm.model):
        wanted = lm.generate(PROMPTS, 6)
    log = evaluated(model(lm, asked))
    assert answers(log) == wanted != lm.generate(PROMPTS, 6)
    assert log.samples[0].output.usage.input_tokens == 12
