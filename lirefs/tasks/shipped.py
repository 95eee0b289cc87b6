"""Data that the package ships, from `lirefs/data`."""

from __future__ import annotations

import tomllib
from importlib import resources
from pathlib import Path
from typing import Any

from lirefs.files import read_jsonl

DATA = Path(str(resources.files("lirefs"))) / "data"


def shipped_rows(name: str) -> list[dict[str, Any]]:
    """Rows of a JSON Lines file."""
    return [row for _, row in read_jsonl(DATA / name)]


def shipped_table(name: str) -> dict[str, Any]:
    """Content of a TOML file."""
    return tomllib.loads((DATA / name).read_text("utf-8"))
