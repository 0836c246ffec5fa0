"""Sections of the page of an analysis; a section without data is empty."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from html import escape
from typing import Any

from hessfunc.app.report import sections
from hessfunc.app.report.html import (
    cards,
    document,
    figure,
    marked,
    said,
    scrolled,
    section,
    table,
    what_was_run,
)
from hessfunc.app.report.meanings import RESIDUAL, meaning
from hessfunc.app.report.rows import Number, Row, aligned, headline, rows

_FIGURES = {
    "density": "Spectral density",
    "line": "Loss along the top eigenvector",
    "plane": "Loss over the top two eigenvectors",
}

_HEADLINES = {
    "eigenvalues": ("top eigenvalue", "residual "),
    "smallest": ("smallest eigenvalue", "residual "),
    "trace": ("trace", "95 % interval "),
}

# Names of the parts in the table of costs.
_PARTS = {
    "eigenvalues": "top eigenvalues",
    "smallest": "smallest eigenvalue",
    "trace": "trace",
    "density": "spectral density",
    "line": "loss on a line",
    "plane": "loss on a plane",
}

_COSTS = (("matvecs", ","), ("passes", ","), ("evaluations", ","), ("seconds", ".1f"))


def headlines(subject: Mapping[str, Any], results: Mapping[str, Any], /) -> str:
    """Return the cards with the main numbers."""
    shown = [Row("loss", (Number(subject["loss"], ".4g"),), ("mean over the examples",))]
    for name, (label, sureness) in _HEADLINES.items():
        if name in results:
            row = next(rows(name, results[name]))
            shown.append(Row(label, row.value, (sureness, *row.sureness)))
    return cards(shown)


def figures(
    results: Mapping[str, Any], pictures: Mapping[str, bytes], matrix: str = "Hessian", /
) -> str:
    """Return the figures, which scripts draw, and pictures for browsers without scripts."""
    drawn = "".join(
        figure(name, title, meaning(name, results[name], matrix), pictures.get(name))
        for name, title in _FIGURES.items()
        if name in results
    )
    return f'<div class="figures">\n{drawn}</div>' if drawn else ""


def tables(results: Mapping[str, Any], matrix: str = "Hessian", /) -> str:
    """Return the tables of eigenvalues and traces."""
    body = "\n".join(filter(None, (_eigenvalues(results, matrix), _traces(results, matrix))))
    return f'<div class="tables">\n{body}\n</div>' if body else ""


def _eigenvalues(results: Mapping[str, Any], matrix: str) -> str:
    """Return the table of eigenvalues with their residuals."""
    names = [name for name in ("eigenvalues", "smallest") if name in results]
    known = [row for name in names for row in rows(name, results[name])]
    lines = [
        [escape(row.label), marked(row.value) + blanks, marked(row.sureness)]
        for row, blanks in zip(known, aligned([row.value for row in known]), strict=True)
    ]
    columns = (("", ""), ("value", "number"), ("\N{PLUS-MINUS SIGN} residual", "number"))
    sentences = [said(meaning(name, results[name], matrix)) for name in names]
    notes = "".join([*sentences, said((RESIDUAL,))])
    return section("values", "Eigenvalues", notes, table(columns, lines)) if lines else ""


def _traces(results: Mapping[str, Any], matrix: str) -> str:
    """Return the table of the trace of each parameter, with bars and error bars."""
    if "trace" not in results or not results["trace"]["by_leaf"]:
        return ""
    data = results["trace"]
    by_leaf = data["by_leaf"]
    intervals = [data.get("by_leaf_95", {}).get(name, (None, None)) for name in by_leaf]
    columns = (("parameter", "name"), ("", "bar"), ("trace", "number"))
    values = [(Number(value, ".4g"),) for value in by_leaf.values()]
    bars = _bars(list(by_leaf.values()), intervals)
    lines = [
        [_breakable(name), bar, marked(value) + blanks]
        for name, value, bar, blanks in zip(by_leaf, values, bars, aligned(values), strict=True)
    ]
    title = "Trace by parameter"
    sentence = said(meaning("trace", data, matrix))
    return section("traces", title, sentence, scrolled(title, table(columns, lines)))


def _breakable(name: str) -> str:
    """Return the name of a parameter as HTML that may break after each dot."""
    return escape(name).replace(".", ".<wbr>")


def _bars(
    values: Sequence[float | None], intervals: Sequence[Sequence[float | None]]
) -> Iterator[str]:
    """Yield bars that extend to both sides of a common zero, with their error bars."""
    known = [value or 0.0 for value in values]
    # An interval that is far wider than all values is cut at the edge of the column.
    reach = 2 * max((abs(value) for value in known), default=0.0)
    ends = [min(max(end, -reach), reach) for pair in intervals for end in pair if end is not None]
    low, high = min([0.0, *known, *ends]), max([0.0, *known, *ends])
    share = 100 / ((high - low) or 1.0)
    for value, (first, last) in zip(known, intervals, strict=True):
        start, width = share * (min(value, 0.0) - low), share * abs(value)
        kind = "negative" if value < 0 else "positive"
        bar = f'<i class="{kind}" style="left:{start:.2f}%;width:{width:.2f}%"></i>'
        if first is not None and last is not None:
            start, end = (share * (min(max(x, -reach), reach) - low) for x in (first, last))
            bar += f'<b style="left:{start:.2f}%;width:{end - start:.2f}%"></b>'
        yield bar


def run(content: Mapping[str, Any], /) -> str:
    """Return the section with everything that is needed to repeat the run."""
    subject = content["subject"]
    examples = (
        *(Number(subject["examples"], ","), " in "),
        *(Number(subject["batches"], ","), " batch" + "es" * (subject["batches"] > 1)),
    )
    return what_was_run(
        content,
        (
            ("target", (subject["target"],)),
            ("matrix", (subject["matrix"],)),
            ("parameters", (Number(subject["parameters"], ","),)),
            ("examples", examples),
            ("precision", (f"{subject['dtype']} on {subject['device']}",)),
            ("seed", (Number(content["run"]["seed"], ""),)),
        ),
    )


def cost(results: Mapping[str, Any], /) -> str:
    """Return the section with the cost of each part, and why it stopped."""
    columns = (
        *(("", ""), ("products", "number"), ("passes", "number passes")),
        *(("evaluations", "number"), ("seconds", "number")),
    )
    lines = [
        [
            f'{escape(_PARTS[name])} <small class="reason">{escape(data["reason"])}</small>',
            *(
                marked((Number(data[cost], style),)) if cost in data else ""
                for cost, style in _COSTS
            ),
        ]
        for name, data in results.items()
    ]
    return section("cost", "What it cost", table(columns, lines)) if lines else ""


_SCRIPTS = ("numbers", "svg", "zoom", "chart", "density", "landscape", "page")


def page(content: dict[str, Any], pictures: Mapping[str, bytes], /) -> str:
    """Return the page of an analysis, with all assets inline, which needs no network.

    All numbers come from the content, which is embedded as JSON. Each number on the page is a
    ``data`` element with its full value. Figures can be zoomed; without scripts, pictures replace
    them.

    Args:
        content: Content from `hessfunc.app.report.content.content`, with a subject.
        pictures: PNG pictures of parts, by name.
    """
    subject, results = content["subject"], content["results"]
    return document(
        content,
        title=subject["target"],
        kind=f"{subject['matrix'][0].upper()}{subject['matrix'][1:]} of the loss of",
        status=content["status"],
        headline=headline(subject)[1:],
        parts=(
            sections.headlines(subject, results),
            sections.figures(results, pictures, subject["matrix"]),
            sections.tables(results, subject["matrix"]),
            sections.run(content),
            sections.cost(results),
        ),
        scripts=_SCRIPTS,
    )
