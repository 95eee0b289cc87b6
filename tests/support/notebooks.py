"""The notebooks: run them, and write what today's code gives.

python tests/support/notebooks.py runs every notebook and writes its outputs into it.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any

import nbformat
from nbclient import NotebookClient

ROOT = Path(__file__).parents[2]
NOTEBOOKS = sorted((ROOT / "examples" / "notebooks").glob("*.ipynb"))


def run(path: Path, folder: Path) -> Any:
    """A notebook with the outputs of today's code, run in a folder of its own."""
    found = nbformat.read(path, as_version=4)
    known = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    settings = {"PYTHONPATH": os.pathsep.join(known), "MPLBACKEND": "inline"}
    settings["OMP_NUM_THREADS"] = "1"  # several crawl where other tests run at the same time
    client = NotebookClient(
        found,
        timeout=300,
        kernel_name="python3",
        resources={"metadata": {"path": str(folder)}},
        record_timing=False,
        coalesce_streams=True,
    )
    about = found.metadata.copy()
    client.execute(env=os.environ | settings)
    found.metadata = about  # the version of Python is not kept
    for cell in found.cells:
        if cell.cell_type == "code":  # progress bars and warnings are not kept
            cell.outputs = [one for one in cell.outputs if one.get("name") != "stderr"]
    return found


def shown(notebook: Any) -> list[list[str]]:
    """What each code cell shows: its text, or the kind of a picture."""
    return [
        [_text(one) for one in cell.outputs] for cell in notebook.cells if cell.cell_type == "code"
    ]


def _text(output: Any) -> str:
    data = output.get("data", {})
    if "image/png" in data:
        return "image/png"
    return data["text/plain"] if data else output.get("text", "")


if __name__ == "__main__":
    for path in NOTEBOOKS:
        with tempfile.TemporaryDirectory() as folder:
            nbformat.write(run(path, Path(folder)), path)
