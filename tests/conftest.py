"""Options, skips with their reason, and fixtures that several test files share."""

from __future__ import annotations

import functools
import importlib.util
import json
import os
import signal

import datasets
import pytest
import torch
from llama_server import VARIABLE
from lm_eval_local import write_tasks
from skill_rows import write
from tiny import fresh_model, tiny_model, tiny_tokenizer

from lirefs.comparison import journal
from lirefs.model.language_model import LanguageModel, wrap
from lirefs.tasks.papers.catalogue import SKILLS

torch.set_num_threads(1)
# A shell that starts something in the background lets it ignore Ctrl-C, and so do its children.
signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--run-slow", action="store_true", help="run tests that take minutes")
    parser.addoption(
        "--fuzz-cases", type=int, default=150, help="damaged files of each kind in test_fuzz.py"
    )
    parser.addoption("--run-weights", action="store_true", help="run tests with real weights")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    reasons = {
        "slow": None if config.getoption("--run-slow") else "slow: run with --run-slow",
        "weights": None
        if config.getoption("--run-weights")
        else "needs the SmolLM2 weights: run with --run-weights",
        "llama": None if VARIABLE in os.environ else "needs llama-server: run .ci/llama",
        "vllm": None if importlib.util.find_spec("vllm") else "needs vLLM: run .ci/vllm",
        "gpu": None if torch.cuda.is_available() else "needs a CUDA device",
    }
    for item in items:
        for name, reason in reasons.items():
            if reason and item.get_closest_marker(name):
                item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(autouse=True)
def _own_cache(request, tmp_path, monkeypatch):
    """No test writes to the user's cache, except those that ask for the real weights."""
    if not request.node.get_closest_marker("weights"):
        monkeypatch.setenv("LIREFS_CACHE", str(tmp_path / "lirefs-cache"))


@pytest.fixture
def small_parts(monkeypatch):
    """Parts of a comparison small enough to be interrupted."""
    monkeypatch.setattr(journal, "PART", 8)


@pytest.fixture(scope="session")
def tokenizer():
    return tiny_tokenizer()


@pytest.fixture(scope="session")
def lm() -> LanguageModel:
    """The shared tiny Llama; tests that change weights build their own with ``fresh_model``."""
    return wrap(tiny_model("llama"), tiny_tokenizer(), name="tiny-llama")


@pytest.fixture
def asked_of_the_hub(monkeypatch):
    """Every call of load_dataset; none reaches a network."""
    calls = []

    def load_dataset(name, config=None, split=None):
        calls.append((name, config, split))
        raise ConnectionError(f"Couldn't reach '{name}' on the Hub")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return calls


@pytest.fixture
def folder(tmp_path):
    """A folder with synthetic rows for every skill."""
    for file in {skill.file for skill in SKILLS.values() if skill.file}:
        write(tmp_path, file)
    return tmp_path


@pytest.fixture
def quick_lm_eval(monkeypatch):
    """Without what takes lm-eval seconds: listing its own tasks, and describing the machine."""
    if importlib.util.find_spec("lm_eval") is not None:
        import lm_eval.evaluator
        import lm_eval.tasks

        manager = functools.partial(lm_eval.tasks.TaskManager, include_defaults=False)
        monkeypatch.setattr(lm_eval.tasks, "TaskManager", manager)
        monkeypatch.setattr(lm_eval.evaluator, "add_env_info", lambda results: None)


@pytest.fixture
def lm_eval_folder(quick_lm_eval, tmp_path, monkeypatch):
    """A folder with two tasks of lm-eval, `fruits` and `words`."""
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    write_tasks(tmp_path)
    return tmp_path


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory):
    """A tiny model on disk, as a user would name it; no test writes to it."""
    path = tmp_path_factory.mktemp("model")
    fresh_model("llama", max_position_embeddings=1024).save_pretrained(path)
    tiny_tokenizer().save_pretrained(path)
    return path


@pytest.fixture
def questions(tmp_path):
    """A file of labelled questions with options, as a user would name it."""
    path = tmp_path / "questions.jsonl"
    rows = [
        {
            "question": f"{'recall' if label == 'memory' else 'compute'} number {i}",
            "label": label,
            "options": ["a", "b"],
            "answer_index": i % 2,
        }
        for label in ("memory", "reasoning")
        for i in range(12)
    ]
    path.write_text("\n".join(map(json.dumps, rows)))
    return path
