"""A stray | in a cell would shift the rest of its row."""

import re

import pytest

from tests.docs.pages import markdown


def uneven(prose: str) -> list[str]:
    """Rows that have another number of cells than the first row of their table."""
    found, cells = [], 0
    for line in prose.splitlines():
        own = len(re.findall(r"(?<!\\)\|", line)) if line.startswith("|") else 0
        found += [line] if cells and own not in (0, cells) else []
        cells = own and (cells or own)
    return found


@pytest.mark.parametrize("page", markdown(), ids=lambda page: page.path)
def test_the_rows_of_every_table_have_as_many_cells_as_its_head(page):
    assert uneven(page.prose) == []


def test_a_stray_bar_is_found():
    table = "| a | b |\n|---|---|\n| {} | 2 |\n\n| c |\n|---|\n| 3 |\n"
    assert uneven(table.format("|w|")) == ["| |w| | 2 |"]
    assert uneven(table.format(r"\|w\|")) == []
