"""Which file may import which: the rules of docs/design.md, read from the syntax tree.

Imports inside functions and under `TYPE_CHECKING` count like any other, and no file is excepted.
"""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
GROUND = {"errors", "files", "pictures", "questions", "statistics", "model", "version"}
MAY_IMPORT = {
    "errors": set(),
    "version": set(),
    "files": {"errors"},
    "pictures": {"errors", "files"},
    "questions": {"errors", "files"},
    "statistics": {"errors"},
    "model": {"errors", "files"},
    "directions": GROUND,
    "steering": {*GROUND, "directions"},
    "export": {*GROUND, "directions", "steering"},
    "tasks": GROUND,
    "comparison": {*GROUND, "tasks"},
    "organism": {*GROUND, "tasks"},
    "kfac": GROUND - {"questions"},
}
"""What each wing of `lirefs`, and `kfac`, may import beside itself."""
ABOVE = ("main_job", "cli", "experiments", "__main__")
"""Wings that may import every wing below them, and those of this list before them."""
DOORS = ("lirefs", "kfac")
"""The two packages that users import; their stubs gather public names from the wings.

The stub of a wing, which gathers the wing's own names, is read in place of its `__init__.py` too.
"""
LONGEST = 400
MOST_MODULES = 16
MOST_AT_THE_TOP = 6


def name_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(part for part in parts if part != "__init__")


MODULES = {
    name_of(path): path
    for package in ("lirefs", "kfac", "experiments")
    for path in sorted([*(ROOT / package).rglob("*.py"), *(ROOT / package).rglob("*.pyi")])
}


def imported(path: Path) -> set[str]:
    """Full names of the project's modules that a file imports, anywhere in it."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            stub = path.suffix == ".pyi"
            assert node.level == stub, f"{path}: imports are absolute, those of stubs relative"
            package = [name_of(path)] if stub else []
            module = ".".join([*package, *([node.module] if node.module else [])])
            names |= {
                f"{module}.{alias.name}" if f"{module}.{alias.name}" in MODULES else module
                for alias in node.names
            }
    return {name for name in names if name.partition(".")[0] in ("lirefs", "kfac", "experiments")}


def wing(name: str) -> str:
    """The wing of a module: its folder or file inside `lirefs`, else its package."""
    package, _, rest = name.partition(".")
    return rest.partition(".")[0] if package == "lirefs" else package


def fault(name: str, other: str) -> str | None:
    """What is wrong with one module importing another."""
    if name in DOORS:
        return f"a door opens to what stands below {ABOVE}" if wing(other) in ABOVE else None
    here, there = wing(name), wing(other)
    if here in ABOVE:
        if there in ABOVE and ABOVE.index(there) > ABOVE.index(here):
            return f"{there} stands above {here}"
        return None
    if other in DOORS and here != other:
        return "only what stands above both packages goes through their doors"
    if here != there and there not in MAY_IMPORT[here]:
        return f"{here} may import {', '.join(sorted(MAY_IMPORT[here])) or 'nothing'}"
    return None


def circles(arrows: dict[str, set[str]]) -> list[list[str]]:
    """The sets of modules that import each other, found by Tarjan's algorithm."""
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found = []

    def visit(name: str) -> None:
        index[name] = low[name] = len(index)
        stack.append(name)
        for other in sorted(arrows[name]):
            if other not in index:
                visit(other)
                low[name] = min(low[name], low[other])
            elif other in stack:
                low[name] = min(low[name], index[other])
        if low[name] == index[name]:
            group = [stack.pop()]
            while group[-1] != name:
                group.append(stack.pop())
            if len(group) > 1 or name in arrows[name]:
                found.append(sorted(group))

    for name in arrows:
        if name not in index:
            visit(name)
    return found


def test_every_wing_has_a_rule():
    wings = {wing(name) for name in MODULES} - {""}
    assert wings == {*MAY_IMPORT, *ABOVE}


def test_arrows():
    faults = [
        f"{name} imports {other}: {found}"
        for name, path in MODULES.items()
        for other in sorted(imported(path))
        if (found := fault(name, other)) is not None
    ]
    assert not faults, "\n".join(faults)


@pytest.mark.parametrize(
    ("name", "other"),
    [
        ("kfac.edits.spectral", "lirefs"),
        ("kfac.edits.spectral", "lirefs.directions.direction"),
        ("lirefs.directions.probe", "kfac.factors.factors"),
        ("lirefs.tasks.task", "kfac"),
        ("lirefs.comparison.compare", "lirefs.steering.steer"),
        ("lirefs.directions.direction", "lirefs.steering.steer"),
        ("lirefs.statistics.intervals", "lirefs.model.layout"),
        ("lirefs.model.layout", "lirefs.questions"),
        ("lirefs.main_job.jobs", "lirefs.cli.options"),
        ("lirefs.cli.app", "experiments.vision"),
        ("lirefs", "lirefs.main_job"),
    ],
)
def test_a_forbidden_arrow_is_found(name, other):
    assert fault(name, other) is not None


def test_no_circle():
    arrows = {
        name: {other for other in imported(path) if other in MODULES}
        for name, path in MODULES.items()
    }
    assert circles(arrows) == []


def test_a_circle_is_found():
    arrows = {"a": {"b"}, "b": {"c"}, "c": {"b", "d"}, "d": {"d"}, "e": {"a"}}
    assert sorted(circles(arrows)) == [["b", "c"], ["d"]]


def test_imports_anywhere_are_seen(tmp_path):
    hidden = tmp_path / "hidden.py"
    hidden.write_text(
        "from typing import TYPE_CHECKING\n"
        "if TYPE_CHECKING:\n    import kfac\n"
        "def one():\n    from lirefs.model import layout\n    import lirefs.cli.app\n"
    )
    assert imported(hidden) == {"kfac", "lirefs.model.layout", "lirefs.cli.app"}


def test_private_names_stay_at_home():
    faults = [
        f"{name}: from {node.module} import {alias.name}"
        for name, path in MODULES.items()
        for node in ast.walk(ast.parse(path.read_text("utf-8")))
        if isinstance(node, ast.ImportFrom)
        and str(node.module).partition(".")[0] in ("lirefs", "kfac", "experiments")
        for alias in node.names
        if alias.name.startswith("_") and not alias.name.startswith("__")
    ]
    assert not faults, "\n".join(faults)


def test_the_house_stays_small():
    lines = {name: path.read_text("utf-8").count("\n") for name, path in MODULES.items()}
    assert not {name: count for name, count in lines.items() if count > LONGEST}
    folders = {path.parent for path in MODULES.values()}
    sizes = {
        str(folder.relative_to(ROOT)): sum(
            path.parent == folder and path.stem != "__init__" for path in MODULES.values()
        )
        for folder in folders
    }
    assert not {folder: size for folder, size in sizes.items() if size > MOST_MODULES}
    assert sizes["lirefs"] <= MOST_AT_THE_TOP


def test_nothing_is_unpickled():
    for name, path in MODULES.items():
        tree = ast.parse(path.read_text("utf-8"))
        modules = {
            found
            for node in ast.walk(tree)
            for found in (
                [alias.name for alias in node.names]
                if isinstance(node, ast.Import)
                else [str(node.module)]
                if isinstance(node, ast.ImportFrom)
                else []
            )
        }
        assert not modules & {"pickle", "cloudpickle", "dill", "joblib", "shelve", "marshal"}, name
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
                call = ast.unparse(node.func)
                assert call not in ("torch.load", "np.load"), f"{name}: {call} can unpickle"
