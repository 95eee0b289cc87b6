"""The examples of the analyses, each at small size."""

import json
import runpy
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"


def run(monkeypatch, name, *arguments):
    monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
    runpy.run_path(str(EXAMPLES / name), run_name="__main__")


def is_picture(path):
    return path.read_bytes().startswith(b"\x89PNG")


def test_facts_of_the_organism_by_frequency(tmp_path, monkeypatch, capsys):
    out = tmp_path / "facts.png"
    run(monkeypatch, "facts_by_frequency.py", "--limit", 4, "--out", out)
    printed = capsys.readouterr().out
    assert printed.count("unchanged") == 5
    assert "Spearman" in printed
    assert is_picture(out)


def test_facts_by_relation(model_folder, tmp_path, monkeypatch, capsys):
    rows = [
        {"relation": r, "prompt": p, "subject": s, "object": o}
        for r, p, s, o in (
            ("capital", "The capital of {} is", "Peru", "Lima"),
            ("capital", "The capital of {} is", "Cuba", "Havana"),
            ("money", "In {} people pay with", "Peru", "soles"),
        )
    ]
    (tmp_path / "facts.jsonl").write_text("\n".join(map(json.dumps, rows)))
    out = tmp_path / "facts.png"
    arguments = ("--relations", tmp_path / "facts.jsonl", "--model", model_folder, "--out", out)
    run(monkeypatch, "facts_by_frequency.py", *arguments, "--limit", 3)
    printed = capsys.readouterr().out
    assert "capital" in printed
    assert "Spearman" not in printed
    assert is_picture(out)


@pytest.mark.parametrize("model", ["organism", "tiny"])
def test_spectrum(model, model_folder, tmp_path, monkeypatch, capsys):
    out = tmp_path / "spectrum.png"
    run(monkeypatch, "spectrum.py", model if model == "organism" else model_folder, 3, out)
    printed = capsys.readouterr().out
    assert "random pairs: memory" in printed
    assert "reads: curvature" in printed
    assert "edit + random direction" in printed
    assert is_picture(out)


def test_two_memorizations(monkeypatch, capsys):
    run(monkeypatch, "two_memorizations.py", 6)
    assert capsys.readouterr().out.count("Spearman of") == 9


def test_compare_methods(tmp_path, monkeypatch, capsys):
    run(monkeypatch, "compare_methods.py", 6, tmp_path)
    printed = capsys.readouterr().out
    assert printed.count("best on validation") == 3
    assert printed.count("K-FAC minus SVD") == 13
    assert is_picture(tmp_path / "pareto.png")
    assert (tmp_path / "report.html").exists()


def test_task_bands(tmp_path, monkeypatch, capsys):
    run(monkeypatch, "task_bands.py", 3, tmp_path / "bands.png")
    assert capsys.readouterr().out.count("bottom half") == 4 * 3 * 4
    assert is_picture(tmp_path / "bands.png")
