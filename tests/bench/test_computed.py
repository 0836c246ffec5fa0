from __future__ import annotations

from pathlib import Path

from bench.computed import computed

PAGE = Path(__file__).parents[2] / "docs" / "planning.md"


def test_the_page_has_the_table_that_is_computed() -> None:
    assert computed() in PAGE.read_text()
