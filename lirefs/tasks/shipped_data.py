"""Data that the package ships, from `lirefs/data`."""

from __future__ import annotations

import tomllib
from importlib import resources
from pathlib import Path
from typing import Any

DATA = Path(str(resources.files("lirefs"))) / "data"


def shipped_table(name: str) -> dict[str, Any]:
    """Content of a TOML file."""
    return tomllib.loads((DATA / name).read_text("utf-8"))
