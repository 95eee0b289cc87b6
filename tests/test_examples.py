import re
import runpy
import sys
from pathlib import Path

import pytest
from tiny import fresh_model, tiny_tokenizer

ROOT = Path(__file__).parent.parent


@pytest.fixture
def folder(tmp_path):
    fresh_model("llama", num_hidden_layers=24).save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_quickstart_runs(folder, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["quickstart.py", str(folder)])
    runpy.run_path(str(ROOT / "examples" / "quickstart.py"), run_name="__main__")
    assert capsys.readouterr().out


def test_readme_shows_the_quickstart():
    example = (ROOT / "examples" / "quickstart.py").read_text()
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert len(blocks) == 2
    for block in blocks:
        assert block.replace('"smollm2-135m"', "MODEL") in example
