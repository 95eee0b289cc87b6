"""The soak in miniature, and what it says about a leak."""

import gc
import importlib.util
import sys
import weakref
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from curvature_tools import batch, llama

import kfac

if not Path("/proc/self/statm").exists():
    pytest.skip("memory is read from /proc: Linux only", allow_module_level=True)
FILE = Path(__file__).parents[2] / "benchmarks" / "soak.py"


@pytest.fixture(scope="module")
def soak():
    spec = importlib.util.spec_from_file_location("soak", FILE)
    module = importlib.util.module_from_spec(spec)
    sys.modules["soak"] = module  # dataclasses look up their module
    spec.loader.exec_module(module)
    yield module
    del sys.modules["soak"]


def readings(soak, count=60, **per_cycle):
    """Readings of a process that grows by a given amount in each cycle."""
    first = soak.Reading(0.0, 500 * soak.MIB, 0, 1000, 5, 3, "same")
    return [
        replace(
            first,
            seconds=float(number),
            **{name: getattr(first, name) + number * step for name, step in per_cycle.items()},
        )
        for number in range(count)
    ]


def test_a_few_cycles_leave_no_hook_no_file_and_every_weight(soak, tmp_path):
    found = soak.soak(0.0, tmp_path, least=2)
    assert len(found) == 3
    assert {one.hooks for one in found} == {0}
    assert len({one.weights for one in found}) == 1
    assert found[-1].files <= found[0].files + 1  # a thread pool or a library may open its own
    lines, _ = soak.verdict(found)
    assert "hooks left: 0" in lines
    assert "weights: bit-identical after every cycle" in lines


@pytest.mark.parametrize(
    ("change", "code"),
    [
        ({}, 0),
        ({"memory": 10_000}, 0),  # 0.1 % in all
        ({"memory": 200_000}, 1),
        ({"hooks": 1}, 1),
        ({"weights": "x"}, 1),
    ],
    ids=str,
)
def test_the_verdict_and_the_exit_code(soak, change, code, tmp_path, monkeypatch, capsys):
    last = change.pop("weights", None)
    found = readings(soak, **change)
    if last:
        found[-1] = replace(found[-1], weights=last)
    monkeypatch.setattr(soak, "soak", lambda minutes, folder: found)
    monkeypatch.setattr(sys, "argv", ["soak.py", "--out", str(tmp_path / "out")])
    assert soak.main() == code
    assert (tmp_path / "out" / "soak.txt").read_text() == capsys.readouterr().out
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "soak.txt",
        "soak.json",
        "soak.png",
    }


def test_one_spike_is_not_growth(soak):
    values = [100.0] * 100
    values[-1] = 200.0
    assert soak.growth(values) == 0.0
    assert soak.growth([*range(100, 200)]) == pytest.approx(194.5 / 114.5 - 1)


def test_what_a_capture_holds_beyond_its_result_does_not_grow(soak):
    found = soak.captured(20_000, cached=True, layers=[0])
    assert found["result"] == 20_000 * 256 * 4
    assert soak.bounded(found), found


def test_a_failed_collection_lets_go_of_its_tensors():
    """No garbage collector sees a cycle through the autograd graph: it has to be broken."""
    model = llama(torch.float32)
    held = []

    def fail(*_):
        raise KeyboardInterrupt

    hooks = [
        model.model.layers[-1].mlp.gate_proj.register_forward_hook(
            lambda module, args, output: held.append(weakref.ref(args[0]))
        ),
        model.model.norm.register_forward_hook(fail),
    ]
    with pytest.raises(KeyboardInterrupt):
        kfac.collect(model, [batch([0, 1])], kfac.find_targets(model), progress=False)
    for hook in hooks:
        hook.remove()
    gc.collect()
    assert held[0]() is None
