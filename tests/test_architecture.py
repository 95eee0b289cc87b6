"""Which module may import which: the arrows of docs/design.md, read from the source."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import kfac
import lirefs

ROOTS = {
    name: Path(package.__file__).parent for name, package in (("lirefs", lirefs), ("kfac", kfac))
}
ABOVE_BOTH = ("lirefs.cli", "lirefs.commands", "lirefs.studies")
"""Modules that may use `kfac`."""
ONE_QUESTION = ("lirefs.models", "kfac.weight_edit")
"""The one arrow from below: a fingerprint needs the weights that an edit replaced."""
NUMERICS = (
    "kfac.estimators",
    "kfac.selection",
    "kfac.spectrum",
    "kfac.statistics",
    "lirefs.estimators",
    "lirefs.learning",
    "lirefs.operators",
    "lirefs.readings",
    "lirefs.significance",
    "lirefs.statistics",
)
"""The lowest floor: arrays in, arrays out."""
UPPER = ("hooks", "guest", "capture", "intervention", "models", "layout", "targets", "harness")
LONGEST = 400


def modules() -> dict[str, Path]:
    found = {}
    for name, root in ROOTS.items():
        for path in sorted(root.rglob("*.py")):
            parts = path.relative_to(root).with_suffix("").parts
            found[".".join((name, *(part for part in parts if part != "__init__")))] = path
    return found


MODULES = modules()


def statements(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    """Statements that run on import; what stands under `if TYPE_CHECKING` does not."""
    for one in body:
        yield one
        if isinstance(one, ast.If) and "TYPE_CHECKING" not in ast.dump(one.test):
            yield from statements(one.body)
            yield from statements(one.orelse)


def imported(path: Path, on_import: bool) -> set[str]:
    """Full names of the modules that a file imports, on import or anywhere."""
    tree = ast.parse(path.read_text("utf-8"))
    names: set[str] = set()
    for node in statements(tree.body) if on_import else ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            module = str(node.module)
            names |= {
                f"{module}.{alias.name}" if f"{module}.{alias.name}" in MODULES else module
                for alias in node.names
            }
    return names


def under(name: str, *packages: str) -> bool:
    return any(name == one or name.startswith(f"{one}.") for one in packages)


def fault(name: str, other: str) -> str | None:
    """What is wrong with one module importing another."""
    if under(name, "kfac") and under(other, "lirefs"):
        return "kfac knows nothing of lirefs"
    above = under(name, *ABOVE_BOTH) or (name, other) == ONE_QUESTION
    if under(name, "lirefs") and under(other, "kfac") and not above:
        return "only the command line and the studies know both packages"
    if under(other, *ABOVE_BOTH) and not above:
        return "nothing below imports the command line or a study"
    owner, _, rest = other.partition(".")
    if owner in ROOTS and name in NUMERICS and rest.partition(".")[0] in UPPER:
        return "numerics know arrays alone"
    return None


def test_arrows():
    faults = [
        f"{name} imports {other}: {found}"
        for name, path in MODULES.items()
        for other in sorted(imported(path, on_import=False))
        if (found := fault(name, other)) is not None
    ]
    assert not faults, "\n".join(faults)


@pytest.mark.parametrize(
    ("name", "other"),
    [
        ("kfac.edit", "lirefs"),
        ("lirefs.harness.tasks", "kfac.edit"),
        ("lirefs.probe", "lirefs.studies.spectra"),
        ("lirefs.statistics", "lirefs.models"),
    ],
)
def test_a_forbidden_arrow_is_found(name, other):
    assert fault(name, other) is not None


def test_private_names_stay_at_home():
    faults = [
        f"{name}: from {node.module} import {alias.name}"
        for name, path in MODULES.items()
        for node in ast.walk(ast.parse(path.read_text("utf-8")))
        if isinstance(node, ast.ImportFrom) and under(str(node.module), *ROOTS)
        for alias in node.names
        if alias.name.startswith("_") and not alias.name.startswith("__")
    ]
    assert not faults, "\n".join(faults)


def test_no_circle():
    arrows = {
        name: sorted(
            other
            for other in imported(path, on_import=True)
            if other in MODULES and other not in (name, *ROOTS)
        )
        for name, path in MODULES.items()
        if name not in ROOTS
    }
    done: set[str] = set()

    def visit(name: str, trail: tuple[str, ...]) -> None:
        assert name not in trail, " -> ".join((*trail[trail.index(name) :], name))
        if name not in done:
            for other in arrows.get(name, ()):
                visit(other, (*trail, name))
            done.add(name)

    for name in arrows:
        visit(name, ())


def test_files_stay_readable():
    lines = {name: path.read_text("utf-8").count("\n") for name, path in MODULES.items()}
    assert not {name: count for name, count in lines.items() if count > LONGEST}


def test_nothing_is_unpickled():
    for name, path in MODULES.items():
        tree = ast.parse(path.read_text("utf-8"))
        names = imported(path, on_import=False)
        assert not names & {"pickle", "cloudpickle", "dill", "joblib", "shelve", "marshal"}, name
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
                call = ast.unparse(node.func)
                assert call not in ("torch.load", "np.load"), f"{name}: {call} can unpickle"
