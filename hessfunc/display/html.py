"""HTML of a summary for notebooks: a small table and a figure."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape

# Notebooks centre and stripe tables; colours are inherited, so that they suit light and dark.
_CELL = "text-align: left; padding: 0 1em 0 0; vertical-align: top; background: none"
_NAME = f"{_CELL}; font-weight: normal; opacity: 0.7"
_VALUE = f"{_CELL}; font-variant-numeric: tabular-nums; overflow-wrap: anywhere; max-width: 45em"


def page(title: str, rows: Mapping[str, str], figure: str | None, /) -> str:
    """Return the HTML of a summary, with every text escaped.

    Args:
        title: Name of the class.
        rows: Texts of the rows by name.
        figure: Figure below the table, as SVG that is already safe; None for no figure.
    """
    table = "".join(
        f'<tr style="background: none"><th scope="row" style="{_NAME}">'
        f'{escape(name.replace("_", " "))}</th><td style="{_VALUE}">{escape(text)}</td></tr>'
        for name, text in rows.items()
    )
    return (
        f'<div class="hessfunc"><strong>{escape(title)}</strong>'
        f'<table style="border-collapse: collapse; margin: 0.3em 0"><tbody>{table}</tbody></table>'
        f"{figure or ''}</div>"
    )
