"""The page of an analysis for the browser, which needs nothing but itself."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hessfunc.report import sections
from hessfunc.report.document import document
from hessfunc.report.rows import headline

__all__ = ["page"]

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
    return document(
        content,
        title=subject["target"],
        kind="Curvature of the loss of",
        status=content["status"],
        headline=headline(subject),
        parts=(
            sections.headlines(subject, results),
            sections.figures(results, pictures),
            sections.tables(results),
            sections.run(content),
            sections.cost(results),
        ),
        scripts=_SCRIPTS,
    )
