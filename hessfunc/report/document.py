"""A whole document of HTML around what it shows."""

from __future__ import annotations

from collections.abc import Iterable
from html import escape
from importlib.resources import files
from string import Template
from typing import Any

from hessfunc.report.content import as_text
from hessfunc.report.markup import marked
from hessfunc.report.rows import Words

__all__ = ["document"]

_ASSETS = files("hessfunc.report") / "assets"


def document(
    content: dict[str, Any],
    /,
    *,
    title: str,
    kind: str,
    status: str,
    headline: Words,
    parts: Iterable[str],
    scripts: Iterable[str] = (),
) -> str:
    """HTML with styles, scripts and data inline; it opens without a network.

    Args:
        content: plain data, which is embedded as JSON.
        title: what it is about.
        kind: what it is, above the title.
        status: of what was run.
        headline: below the title.
        parts: of HTML, of which some may be empty.
        scripts: names of assets, which run as one module.
    """
    script = "\n".join(_asset(f"{name}.js") for name in scripts)
    return Template(_asset("page.html")).substitute(
        title=escape(title),
        kind=escape(kind),
        status=escape(status),
        headline=marked(headline),
        parts="\n".join(filter(None, parts)),
        style=_asset("page.css"),
        # In JSON a string may hold </script>, which would end the element.
        content=as_text(content).replace("<", "\\u003c"),
        script=f'<script type="module">\n{script}</script>\n' if script else "",
    )


def _asset(name: str) -> str:
    return (_ASSETS / name).read_text(encoding="utf-8")
