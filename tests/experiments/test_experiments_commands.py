"""The command of every experiment, in a quick form."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import forked
import pytest
from typer.testing import CliRunner

import lirefs
from experiments.steering import tasks_of
from experiments.vision.__main__ import app
from lirefs.comparison import Comparison, TaskInfo
from lirefs.tasks import ItemResult

ROOT = Path(__file__).parents[2]
COMMANDS = [
    "experiments.arithmetic",
    "experiments.counterfactual",
    "experiments.label_noise",
    "experiments.loss_positions",
    "experiments.planting",
    "experiments.recited",
    "experiments.sharpness",
    "experiments.spectra",
    "experiments.steering",
    "experiments.vision",
    "experiments.vision.one_network",
    "experiments.write_flat",
]

STEERED = ["elimination", "two-digit addition", "facts, open book", "facts, closed book"]


@pytest.fixture
def experiment(tmp_path, monkeypatch, capsys):
    """Runs an experiment in an empty folder and returns what it prints."""
    monkeypatch.chdir(tmp_path)

    def run(name, *arguments):
        monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
        runpy.run_module(name, run_name="__main__")
        return capsys.readouterr().out

    return run


@pytest.mark.parametrize("name", COMMANDS)
def test_the_page_of_experiments_names_every_command(name):
    assert f"python -m {name}" in (ROOT / "docs" / "experiments.md").read_text("utf-8")


def test_a_command_runs_from_the_checkout():
    command = ("experiments.counterfactual", ["--help"], ROOT)
    with forked.started(forked.module, *command) as (process, connection):
        printed = connection.recv()
        process.join(60)
        assert process.exitcode == 0
    assert "--limit" in printed


@pytest.mark.parametrize("model", ["organism", "tiny"])
def test_spectra(model, experiment, model_folder):
    chosen = "organism" if model == "organism" else model_folder
    printed = experiment("experiments.spectra", "--model", chosen, "--limit", 3)
    assert "random pairs: memory" in printed
    assert "edit + random direction" in printed
    assert Path("spectra/spectra.png").read_bytes().startswith(b"\x89PNG")


def test_sharpness(experiment):
    assert "reads: curvature" in experiment("experiments.sharpness", "--limit", 3)


def test_steering(experiment, model_folder):
    arguments = ["--model", model_folder, "--layers", 1, "--strengths", 1, "--limit", 3]
    printed = experiment("experiments.steering", *arguments, "--texts", 2)
    rows = [line.split(" | ") for line in printed.splitlines() if line.startswith("| default")]
    tasks = [row[1] for row in rows]
    assert tasks[:4] == [f"{one} (3)" for one in STEERED]
    assert all("layer 1, strength" in row[2] for row in rows)
    assert tasks[4:] == ["passages (3)"]
    assert printed.splitlines()[-1].startswith("Beyond random directions: ")
    again = experiment("experiments.steering", *arguments, "--texts", 2)
    assert again == printed  # from the journal


def test_sides_of_the_steering_share_no_item():
    sides = [tasks_of(side, 60) for side in ("validation", "test")]
    for one, other in zip(*sides, strict=True):
        assert len(one.items) == len(other.items) == 60
        assert not {item[1] for item in one.items} & {item[1] for item in other.items}


def test_counterfactual(experiment):
    printed = experiment("experiments.counterfactual", "--limit", 6)
    assert printed.count("Spearman of") == 12


def test_label_noise(experiment):
    arguments = ["--texts", "4,8", "--layers", 3, "--reference", 6]
    lines = experiment("experiments.label_noise", *arguments).splitlines()
    assert [line.split(" tokens, ")[1].split(":")[0] for line in lines] == [
        "1 draws against 6",
        "4 draws against 6",
    ] * 2
    errors = [float(line.rpartition(" by ")[2].rstrip(".")) for line in lines]
    assert errors[0] > errors[1] > 0


def test_loss_positions(experiment):
    arguments = ["--model", "organism", "--layers", 3, "--shares", "1,0.25", "--rows", 4]
    lines = experiment("experiments.loss_positions", *arguments, "--rounds", 2).splitlines()
    assert [line.split(" of the")[0] for line in lines] == ["losses at 100%", "losses at 25%"]
    whole, part = (float(line.split("of G ")[1].split(",")[0]) for line in lines)
    assert 0 < whole < part  # a quarter of the losses saves little where the vocabulary is small


def test_one_network(experiment, tmp_path, monkeypatch):
    monkeypatch.setenv("LIREFS_CACHE", str(tmp_path / "cache"))
    assert experiment("experiments.vision.one_network", "--epochs", 1).count("keep ") == 7
    kept = [path.name for path in (tmp_path / "cache" / "vision").iterdir()]
    assert kept == ["noised-0-1.safetensors"]


def test_arithmetic_reads_a_report(experiment, tmp_path):
    def item(output, right):
        scores = {"accuracy": right}
        return [ItemResult("1", scores, prompt="2 + 3 + 4", expected="9", output=output)]

    found = Comparison(
        {
            "unchanged": {"sums": item("2 + 3 = 5, 5 + 4 = 9", 1.0)},
            "K-FAC": {"sums": item("2 + 3 = 5, 5 + 4 = 8", 0.0)},
        },
        {"sums": TaskInfo("arithmetic", "accuracy")},
    )
    lirefs.write_report(found, tmp_path / "report")
    printed = experiment("experiments.arithmetic", tmp_path / "report")
    assert "Worked answers of sums that K-FAC makes wrong, n = 1" in printed
    assert "same operations, wrong calculation 1" in printed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--out file", "file: exists"),
        ("--out new --blocks 0.5", "--blocks '0.5'"),
        ("--out new --decays a", "--decays 'a'"),
        ("--out new --images folder", "images 'folder'"),
        ("--out new --limit 0", "--limit"),
        ("--out new --epochs -1", "--epochs"),
        ("--out new --seeds 1", "seeds=1"),
        ("--out new --tokens al", "cls or all"),
        ("--out new --projections both", "up and down"),
    ],
)
def test_vision_names_what_is_wrong_before_it_trains(arguments, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("file").touch()
    Path("folder").mkdir()
    done = CliRunner().invoke(app, arguments.split())
    assert done.exit_code
    assert message in " ".join(f"{done.output} {done.exception}".split())
    assert not Path("new").exists()
