"""Results of a command: tables and sentences on the terminal, or plain data."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

# Largest width of a table, in characters.
_WIDEST = 1000
_STYLE: Any = {"markup": False, "emoji": False, "highlight": False}


@dataclass(frozen=True)
class Output:
    """Results of a command.

    Attributes:
        parts: Tables and sentences in the order of printing.
        content: Plain data of the results.
        failure: Error message that follows the results; empty if there is none.
        code: Exit code of a command without an error message.
    """

    parts: Iterable[Table | str]
    content: Mapping[str, Any]
    failure: str = ""
    code: int = 0


def table(columns: Sequence[str], rows: Iterable[Sequence[str]], /, *, left: int = 1) -> Table:
    """Return a table whose numbers are aligned to the right.

    Args:
        columns: Titles of the columns.
        rows: Cells of each row. An empty row ends a section.
        left: Number of first columns that are aligned to the left.
    """
    drawn = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for i, title in enumerate(columns):
        drawn.add_column(title, justify="left" if i < left else "right", no_wrap=True)
    for row in rows:
        if row:
            drawn.add_row(*row)
        else:
            drawn.add_section()
    return drawn


def print_parts(parts: Iterable[Table | str], /) -> None:
    """Print tables and sentences.

    A table has its own width: a narrow terminal wraps its lines, and cuts no number.
    """
    console = Console(**_STYLE)
    for part in parts:
        if isinstance(part, Table):
            options = console.options.update(max_width=_WIDEST)
            width = max(console.measure(part, options=options).maximum, console.width)
            Console(file=console.file, width=width, **_STYLE).print(part, crop=False)
        else:
            console.print(part, soft_wrap=True)
