import importlib
import pkgutil
import re
from pathlib import Path
from types import ModuleType

import cli_page
import pytest
from typer.testing import CliRunner

import kfac
import lirefs
from lirefs.cli import app as cli

REFERENCE = Path(__file__).parents[2] / "docs" / "reference"


def directives(*pages):
    """The objects that the pages ask mkdocstrings to show, in order."""
    text = "\n".join((REFERENCE / f"{page}.md").read_text() for page in pages)
    return re.findall(r"^::: (\S+)$", text, re.MULTILINE)


def public(package):
    return [name for name in package.__all__ if not isinstance(getattr(package, name), ModuleType)]


@pytest.mark.parametrize("package", [lirefs, kfac], ids=lambda package: package.__name__)
def test_every_public_name_is_shown_once(package):
    name = package.__name__
    paths = [path for path in directives(name) if path.count(".") == 1]
    shown = [path.partition(".")[2] for path in paths if path != "lirefs.errors"]
    assert sorted(shown) == sorted({*public(package), *(["figures"] if package is kfac else [])})


@pytest.mark.parametrize(
    "door",
    [one for name in lirefs.__all__ if isinstance(one := getattr(lirefs, name), ModuleType)],
    ids=str,
)
def test_every_name_of_a_door_is_shown(door):
    shown = {*directives("lirefs", "wings")}
    for name in public(door) if hasattr(door, "__all__") else []:
        paths = {f"{door.__name__}.{name}", f"lirefs.{name}"}
        assert paths & shown, f"{door.__name__}.{name} is on no page"


def test_what_is_shown_exists_and_is_shown_once():
    shown = directives("lirefs", "wings", "kfac")
    assert len(shown) == len(set(shown))
    for path in shown:
        pkgutil.resolve_name(path)  # raises if it does not exist


def test_members_of_modules_exist():
    text = "\n".join(page.read_text() for page in sorted(REFERENCE.glob("*.md")))
    blocks = re.findall(r"^::: (\S+)\n    options:\n      members: (\[.*\])", text, re.M)
    assert blocks
    for path, members in blocks:
        module = importlib.import_module(path)
        missing = [one for one in re.findall(r"\w+", members) if not hasattr(module, one)]
        assert not missing, f"{path}: {missing}"


def test_the_page_of_the_command_line_is_what_the_commands_say():
    assert cli_page.PAGE.read_text() == cli_page.page(), "run: python tests/support/cli_page.py"


@pytest.mark.parametrize("name", [name for name, _ in cli_page.commands()])
def test_help_has_the_options_of_the_page(name):
    words = [*name.split()[1:], "--help"]
    shown = CliRunner().invoke(cli.app, words, env={"COLUMNS": "300", "NO_COLOR": "1"})
    assert shown.exit_code == 0
    (section,) = re.findall(
        rf"^## {name}\n(.*?)(?=^## |\Z)", cli_page.PAGE.read_text(), re.M | re.S
    )
    promised = set(re.findall(r"^\| `(--[a-z-]+)`", section, re.M))
    found = set(re.findall(r"(?<=[\s│])--[a-z-]+(?=\s)", shown.output)) - {"--help"}
    # Options are also named inside the sentences of other options.
    assert promised <= found
    assert found - promised <= {"--memorized", "--out"}
