from __future__ import annotations

import re
from pathlib import Path

from bench.computed import computed

PAGE = Path(__file__).parents[2] / "docs" / "planning.md"


def test_the_page_has_the_table_that_is_computed() -> None:
    assert computed() in PAGE.read_text()


def test_the_code_of_the_page_runs() -> None:
    (block,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    names: dict[str, object] = {}
    exec(compile(block, str(PAGE), "exec"), names)
    assert "estimate" in names
