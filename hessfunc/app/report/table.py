"""What was found, on a terminal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich import box
from rich.table import Table

from hessfunc.app.report.rows import plain, rows


def table(results: Mapping[str, Mapping[str, Any]], /) -> Table:
    """Each number with its residual or its interval, and what each part has cost.

    Args:
        results: the plain data of each part, by name.
    """
    drawn = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    drawn.add_column("", no_wrap=True)
    for column in ("value", "residual or 95 % interval", "products", "time"):
        drawn.add_column(column, justify="right", no_wrap=True)
    for name, found in results.items():
        cost = [f"{found['matvecs']:,}", f"{found['seconds']:.1f} s"]
        for row in rows(name, found):
            drawn.add_row(row.label, plain(row.value), plain(row.sureness), *cost)
            cost = []
        drawn.add_section()
    return drawn
