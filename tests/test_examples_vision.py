"""The vision example, with a training of one epoch."""

import runpy
import sys
from pathlib import Path

EXAMPLE = Path(__file__).parent.parent / "examples" / "vit_label_noise.py"


def test_vit_label_noise(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("LIREFS_CACHE", str(tmp_path))
    monkeypatch.setattr(sys, "argv", [EXAMPLE.name, "1"])
    runpy.run_path(str(EXAMPLE), run_name="__main__")
    assert capsys.readouterr().out.count("keep ") == 7
    assert [path.name for path in (tmp_path / "vision").iterdir()] == ["noised-0-1.safetensors"]
