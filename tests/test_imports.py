"""Importing the packages imports nothing that only a later call needs."""

import json
import subprocess
import sys

import pytest

import kfac
import lirefs

HEAVY = ("torch", "transformers", "scipy", "sklearn", "matplotlib", "pandas", "datasets", "rich")


def modules_after(code: str) -> set[str]:
    """Top-level modules that a new interpreter has imported after some code."""
    code = f"{code}; import json, sys; print(json.dumps(sorted(sys.modules)))"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120
    )
    return {name.partition(".")[0] for name in json.loads(done.stdout)}


def test_the_packages_alone_import_nothing_heavy():
    assert not modules_after("import lirefs, kfac") & set(HEAVY)


def test_errors_need_nothing_heavy_to_be_caught():
    assert not modules_after("import lirefs; lirefs.errors.KfacError") & set(HEAVY)


@pytest.mark.parametrize("package", [lirefs, kfac])
def test_every_public_name_is_there(package):
    assert sorted(dir(package)) == sorted(package.__all__)
    for name in package.__all__:
        assert getattr(package, name) is not None
    with pytest.raises(AttributeError, match="nothing_of_this_name"):
        package.nothing_of_this_name  # noqa: B018
