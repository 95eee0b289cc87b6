"""Every way of running a model against one row alone, for families of every kind."""

import pytest
from families import CORE, FAMILIES
from family_table import PAGE, check_family, is_silent, reasons, row


@pytest.mark.parametrize("name", CORE)
def test_no_family_differs_silently(name):
    silent = {cell: found for cell, found in check_family(name).items() if is_silent(found)}
    assert silent == {}


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_the_page_tells_what_each_family_does(name):
    cells = check_family(name)
    assert {cell: found for cell, found in cells.items() if is_silent(found)} == {}
    page = PAGE.read_text("utf-8").splitlines()
    for line in [row(name, cells), *reasons(name, cells)]:
        assert line in page


def test_the_table_can_fail(monkeypatch):
    monkeypatch.setattr("lirefs.model.traits.Traits.groups", _all_in_one)
    found = check_family("rwkv")
    assert any(is_silent(cell) for cell in found.values())


def _all_in_one(self, lengths, budget, side, enough=None):
    return [list(range(len(lengths)))]
