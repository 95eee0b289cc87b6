import importlib.util
import runpy
import sys
from pathlib import Path

import forked
import preloaded
import pytest

import lirefs

ROOT = Path(__file__).parents[2]
BENCHMARKS = sorted(p for p in (ROOT / "benchmarks").glob("*.py") if "def main" in p.read_text())


def test_public_names_leave_optional_packages_alone():
    with forked.started(preloaded.modules_of_the_packages) as (_, connection):
        modules = connection.recv()
    assert {"lirefs", "kfac", "torch"} <= modules
    heavy = {"transformer_lens", "nnsight", "datasets", "matplotlib", "lm_eval", "vllm"}
    assert not heavy & modules


def test_version_matches_the_distribution():
    from importlib.metadata import version

    assert version("lirefs") == lirefs.__version__


def test_what_people_cite_is_this_version():
    assert f"\nversion: {lirefs.__version__}\n" in (ROOT / "CITATION.cff").read_text("utf-8")
    assert f"\n## {lirefs.__version__}\n" in (ROOT / "CHANGELOG.md").read_text("utf-8")


@pytest.mark.parametrize("path", BENCHMARKS, ids=lambda path: path.stem)
def test_every_benchmark_has_a_command_that_documents_name(path, monkeypatch, capsys):
    command = f"benchmarks/{path.name}"
    assert f"    python {command}" in path.read_text().split('"""')[1]
    assert any(command in page.read_text() for page in (ROOT / "docs").glob("*.md"))
    if path.stem == "harness" and importlib.util.find_spec("lm_eval") is None:
        pytest.skip("lm_eval is not installed: pip install 'lm-eval>=0.4.13'")
    monkeypatch.syspath_prepend(str(path.parent))
    monkeypatch.setattr(sys, "argv", [path.name, "--help"])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(path), run_name="__main__")
    assert stop.value.code == 0
    assert path.name in capsys.readouterr().out
