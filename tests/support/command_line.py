"""The command line, run in this process."""

from __future__ import annotations

import pytest

from lirefs.cli import app as cli


def run(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> object:
    """Run `lirefs ARGUMENTS` and return its exit code."""
    monkeypatch.setattr("sys.argv", ["lirefs", *map(str, arguments)])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    return stop.value.code
