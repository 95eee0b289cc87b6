"""The steering examples, each at small size."""

import json
import runpy
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"


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
def test_example_runs(name, printed, model_folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    run(name, monkeypatch, model_folder)
    assert printed in capsys.readouterr().out


def test_lm_eval_says_how_to_install_it(model_folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(SystemExit, match="pip install"):
        run("lm_eval_steered.py", monkeypatch, model_folder)


TASK = """
task: sums
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: ["2", "3"]
doc_to_target: answer
metric_list: [{{metric: acc}}]
"""


def test_lm_eval_steered_runs(quick_lm_eval, model_folder, tmp_path, monkeypatch, capsys):
    pytest.importorskip("lm_eval", reason="lm_eval is not installed: pip install 'lm-eval>=0.4.13'")
    data = tmp_path / "sums.jsonl"
    rows = [{"question": f"1 + {1 + i % 2} =", "answer": i % 2} for i in range(4)]
    data.write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "sums.yaml").write_text(TASK.format(data=data))
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    run("lm_eval_steered.py", monkeypatch, model_folder, "sums", 4, tmp_path)
    out = capsys.readouterr().out
    assert "unsteered {" in out
    assert "acc" in out


def test_code_boundary(model_folder, monkeypatch, capsys):
    run("code_boundary.py", monkeypatch, model_folder, 4)
    assert capsys.readouterr().out.count("on the side of reasoning") == 3
