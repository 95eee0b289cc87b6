"""Importing the packages, and asking for help, imports nothing that only a later call needs."""

import json
import subprocess
import sys

import cli_page
import pytest

import kfac
import lirefs.main_job
import lirefs.questions

DOORS = [
    lirefs, lirefs.comparison, lirefs.directions, lirefs.export, lirefs.main_job, lirefs.model,
    lirefs.organism, lirefs.questions, lirefs.statistics, lirefs.steering, lirefs.tasks, kfac,
]  # fmt: skip
HEAVY = {"torch", "transformers", "numpy", "scipy", "sklearn", "matplotlib", "pandas", "datasets"}
MOST_MODULES = 600
"""Modules for the help of all commands together; `import torch` alone loads more."""
ASKED = """
import sys
from lirefs.cli.app import main
sys.argv[:] = ["lirefs", *{words}]
try:
    main()
except SystemExit as end:
    assert not end.code
"""


def modules_after(code: str) -> set[str]:
    """Modules that a new interpreter has imported after some code."""
    code = f"{code}\nimport json, sys; print(); print(json.dumps(sorted(sys.modules)))"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120
    )
    return set(json.loads(done.stdout.splitlines()[-1]))


def test_the_packages_alone_import_nothing_heavy():
    assert not modules_after("import lirefs, kfac") & {*HEAVY, "rich"}


def test_errors_need_nothing_heavy_to_be_caught():
    assert not modules_after("import lirefs; lirefs.errors.KfacError") & {*HEAVY, "rich"}


def test_help_imports_nothing_heavy():
    commands = [name.split()[1:] for name, _ in cli_page.commands()]
    groups = sorted({words[0] for words in commands if len(words) > 1})
    asked = [["--version"], *([*one, "--help"] for one in ([], *([g] for g in groups), *commands))]
    found = modules_after("".join(ASKED.format(words=words) for words in asked))
    assert "lirefs.cli.organism" in found
    heavy = found & HEAVY
    assert not heavy
    assert len(found) <= MOST_MODULES


def test_a_heavy_import_is_seen():
    assert "torch" in modules_after("import lirefs; lirefs.load")


@pytest.mark.parametrize("package", DOORS, ids=lambda package: package.__name__)
def test_every_public_name_is_there(package):
    assert sorted(dir(package)) == sorted(package.__all__)
    for name in package.__all__:
        assert getattr(package, name) is not None
    with pytest.raises(AttributeError, match="nothing_of_this_name"):
        package.nothing_of_this_name  # noqa: B018
