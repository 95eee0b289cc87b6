"""The examples in docstrings run, and print what they show; the organism is loaded once."""

import doctest
import functools
import importlib
from pathlib import Path

import pytest

import kfac
import lirefs

ROOT = Path(__file__).parents[2]
MOST_USED = (
    lirefs.load,
    lirefs.wrap,
    lirefs.capture,
    lirefs.fit,
    lirefs.Steer,
    lirefs.compose,
    lirefs.compare,
    lirefs.write_report,
    lirefs.load_questions,
    lirefs.LanguageModel.generate,
    kfac.collect,
    kfac.CurvatureEdit,
)


def examples():
    """Every docstring of both packages that has an example."""
    for package in ("lirefs", "kfac"):
        for file in sorted((ROOT / package).rglob("*.py")):
            if ">>> " in file.read_text(encoding="utf-8"):
                name = ".".join(file.relative_to(ROOT).with_suffix("").parts)
                module = importlib.import_module(name.removesuffix(".__init__"))
                found = doctest.DocTestFinder(exclude_empty=True).find(module, globs={})
                yield from (one for one in found if one.examples)


EXAMPLES = {one.name: one for one in examples()}


@pytest.fixture(scope="module")
def load():
    return functools.cache(lirefs.load)


@pytest.mark.parametrize("used", MOST_USED, ids=lambda used: used.__qualname__)
def test_the_most_used_functions_have_an_example(used):
    assert f"{used.__module__}.{used.__qualname__}" in EXAMPLES


@pytest.mark.parametrize("name", EXAMPLES)
def test_an_example_prints_what_it_shows(name, load, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(lirefs, "load", load)
    said = []
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS)
    runner.run(EXAMPLES[name], out=said.append)
    assert not runner.failures, "".join(said)
