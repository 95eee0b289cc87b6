"""The steering examples, each at small size."""

import importlib.util
import runpy
import sys
from pathlib import Path

import pytest
from tiny import fresh_model, tiny_tokenizer

EXAMPLES = Path(__file__).parent.parent / "examples"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    fresh_model("llama", max_position_embeddings=512).save_pretrained(path)
    tiny_tokenizer().save_pretrained(path)
    return path


def run(name, monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
    runpy.run_path(str(EXAMPLES / name), run_name="__main__")


@pytest.mark.parametrize(
    ("name", "printed"),
    [
        ("fit_direction.py", "test AUROC"),
        ("steer_generation.py", "unsteered"),
        ("conditional_steering.py", "->"),
        ("backends.py", "nnsight differs by"),
        ("export_llama_cpp.py", "block"),
    ],
)
def test_example_runs(name, printed, folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    run(name, monkeypatch, folder)
    assert printed in capsys.readouterr().out


def test_lm_eval_says_how_to_install_it(folder, monkeypatch):
    if importlib.util.find_spec("lm_eval") is not None:
        pytest.skip("lm_eval is installed")
    with pytest.raises(SystemExit, match="pip install"):
        run("lm_eval_steered.py", monkeypatch, folder)


def test_lm_eval_steered_runs(folder, monkeypatch, capsys):
    pytest.importorskip("lm_eval", reason="lm_eval is not installed: pip install 'lm-eval>=0.4.9'")
    pytest.skip("its tasks are fetched from a hub")
