"""One page for the browser, which needs nothing but itself."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from importlib.resources import files
from string import Template
from typing import Any

from hessfunc.report import sections
from hessfunc.report.content import as_text
from hessfunc.report.markup import marked
from hessfunc.report.rows import headline

__all__ = ["page"]

_ASSETS = files("hessfunc.report") / "assets"
_SCRIPTS = ("numbers", "svg", "zoom", "chart", "density", "landscape", "page")


def page(content: dict[str, Any], pictures: Mapping[str, bytes], /) -> str:
    """HTML with styles, scripts, pictures and data inline; it opens without a network.

    All numbers are those of the content, which is embedded as JSON; each that is written stands
    in a ``data`` element with its value in full. Figures can be zoomed; where scripts are off,
    pictures take their place.

    Args:
        content: as `hessfunc.report.content.content` makes it, with a subject.
        pictures: of parts, by name, as PNG.
    """
    subject, results = content["subject"], content["results"]
    parts = (
        sections.headlines(subject, results),
        sections.figures(results, pictures),
        sections.tables(results),
        sections.run(content),
        sections.cost(results),
    )
    return Template(_asset("page.html")).substitute(
        target=escape(subject["target"]),
        status=escape(content["status"]),
        headline=marked(headline(subject)),
        parts="\n".join(filter(None, parts)),
        style=_asset("page.css"),
        # In JSON a string may hold </script>, which would end the element.
        content=as_text(content).replace("<", "\\u003c"),
        script="\n".join(_asset(f"{name}.js") for name in _SCRIPTS),
    )


def _asset(name: str) -> str:
    return (_ASSETS / name).read_text(encoding="utf-8")
