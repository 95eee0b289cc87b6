"""The examples of the curvature edit, on a tiny model."""

import runpy
import sys
from pathlib import Path

from transformers import AutoModelForCausalLM

EXAMPLES = Path(__file__).parent.parent / "examples"


def run(monkeypatch, name, *arguments):
    monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
    runpy.run_path(str(EXAMPLES / name), run_name="__main__")


def test_kfac_edit(model_folder, tmp_path, monkeypatch, capsys):
    run(monkeypatch, "kfac_edit.py", model_folder, "1,2", tmp_path / "edited")
    assert capsys.readouterr().out.count("keep 0.") == 4
    AutoModelForCausalLM.from_pretrained(tmp_path / "edited")


def test_detect_recitation(model_folder, monkeypatch, capsys):
    run(monkeypatch, "detect_recitation.py", model_folder, "1,2")
    assert len(capsys.readouterr().out.splitlines()) == 2


def test_protect_arithmetic(model_folder, monkeypatch, capsys):
    run(monkeypatch, "protect_arithmetic.py", model_folder, "1,2", 4)
    assert "arithmetic protected" in capsys.readouterr().out


def test_custom_task(model_folder, tmp_path, monkeypatch, capsys):
    run(monkeypatch, "custom_task.py", model_folder, "1,2", tmp_path / "report")
    assert capsys.readouterr().out.count("distinct") == 4
    assert (tmp_path / "report" / "report.html").exists()
