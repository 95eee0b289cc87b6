"""The examples of the curvature edit, on a tiny model."""

import runpy
import sys
from pathlib import Path

import pytest
from tiny import fresh_model, tiny_tokenizer
from transformers import AutoModelForCausalLM

EXAMPLES = Path(__file__).parent.parent / "examples"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    fresh_model("llama", max_position_embeddings=1024).save_pretrained(path)
    tiny_tokenizer().save_pretrained(path)
    return path


def run(monkeypatch, name, *arguments):
    monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
    runpy.run_path(str(EXAMPLES / name), run_name="__main__")


def test_kfac_edit(folder, tmp_path, monkeypatch, capsys):
    run(monkeypatch, "kfac_edit.py", folder, "1,2", tmp_path / "edited")
    assert capsys.readouterr().out.count("keep 0.") == 4
    AutoModelForCausalLM.from_pretrained(tmp_path / "edited")


def test_detect_recitation(folder, monkeypatch, capsys):
    run(monkeypatch, "detect_recitation.py", folder, "1,2")
    assert len(capsys.readouterr().out.splitlines()) == 2


def test_protect_arithmetic(folder, monkeypatch, capsys):
    run(monkeypatch, "protect_arithmetic.py", folder, "1,2", 4)
    assert "arithmetic protected" in capsys.readouterr().out


def test_custom_task(folder, tmp_path, monkeypatch, capsys):
    run(monkeypatch, "custom_task.py", folder, "1,2", tmp_path / "report")
    assert capsys.readouterr().out.count("distinct") == 4
    assert (tmp_path / "report" / "report.html").exists()
