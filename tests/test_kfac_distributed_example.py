import runpy
import sys
from pathlib import Path

from tiny import fresh_model, tiny_tokenizer

from kfac import Factors

EXAMPLE = Path(__file__).parent.parent / "examples" / "distributed_collect.py"


def test_example_runs_as_one_process_and_goes_on(tmp_path, monkeypatch, capsys):
    fresh_model("llama").save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    (tmp_path / "texts").write_text("one line\n\nanother line of text\na third\n")
    arguments = [tmp_path / "model", tmp_path / "texts", tmp_path / "out", "--batch", 2]
    monkeypatch.setattr(sys, "argv", [str(x) for x in (EXAMPLE, *arguments, "--layers", 1)])
    for _ in range(2):
        runpy.run_path(str(EXAMPLE), run_name="__main__")
    assert "2 targets" in capsys.readouterr().out
    assert Factors.load(tmp_path / "out").tokens > 20
