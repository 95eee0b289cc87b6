"""The notebooks run, show what they show, and are pages of the site."""

import nbformat
import pytest
from notebooks import NOTEBOOKS, run, shown


def test_there_is_a_notebook_for_each_thing_people_do():
    assert [path.stem for path in NOTEBOOKS] == ["compare", "edit", "steer"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_shows_what_it_gives_today(path, tmp_path):
    kept = nbformat.read(path, as_version=4)
    assert shown(run(path, tmp_path)) == shown(kept), "run: python tests/support/notebooks.py"
    assert path.stat().st_size < 100_000
