"""Folders and files that a stranger made: nothing of theirs runs or costs what it should not."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_python_m_lirefs_imports_nothing_from_the_working_folder(tmp_path):
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    for folder, code in ((ours, 3), (theirs, 77)):
        folder.mkdir()
        for name in ("numpy", "torch", "pathlib", "json"):
            (folder / f"{name}.py").write_text(f"raise SystemExit({code})")
    for name in ("pathlib", "json"):
        (ours / f"{name}.py").unlink()
    places = os.pathsep.join(map(str, (ours, ROOT)))
    done = subprocess.run(
        [sys.executable, "-m", "lirefs", "--version"],
        cwd=theirs,
        env={**os.environ, "PYTHONPATH": places},
        check=False,
    )
    assert done.returncode == 3
