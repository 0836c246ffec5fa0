"""Sections of the page of an analysis; a section without data is empty."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from html import escape
from typing import Any

from hessfunc.app.report import sections
from hessfunc.app.report.html import document, facts, image, marked, scrolled, section, table
from hessfunc.app.report.rows import Number, Words, headline, rows

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
    cards = [card("loss", (Number(subject["loss"], ".4g"),), ("mean over the examples",))]
    for name, (label, sureness) in _HEADLINES.items():
        if name in results:
            row = next(rows(name, results[name]))
            cards.append(card(label, row.value, (sureness, *row.sureness)))
    return f'<dl class="headlines">\n{"".join(cards)}</dl>'


def card(label: str, value: Words, sureness: Words) -> str:
    """Return a card with one number and its uncertainty."""
    return (
        f"<div><dt>{escape(label)}</dt><dd>{marked(value)}</dd>"
        f'<dd class="sureness">{marked(sureness)}</dd></div>\n'
    )


def figures(results: Mapping[str, Any], pictures: Mapping[str, bytes], /) -> str:
    """Return the figures, which scripts draw, and pictures for browsers without scripts."""
    drawn = [_figure(name, pictures.get(name)) for name in _FIGURES if name in results]
    return f'<div class="figures">\n{"".join(drawn)}</div>' if drawn else ""


def _figure(name: str, picture: bytes | None) -> str:
    title = _FIGURES[name]
    still = "This figure requires JavaScript." if picture is None else image(picture, title)
    return (
        f'<figure id="{name}" aria-labelledby="{name}-title">\n'
        f'<h2 id="{name}-title">{escape(title)}</h2>\n<noscript>{still}</noscript>\n</figure>\n'
    )


def tables(results: Mapping[str, Any], /) -> str:
    """Return the tables of eigenvalues and traces."""
    body = "\n".join(filter(None, (_eigenvalues(results), _traces(results))))
    return f'<div class="tables">\n{body}\n</div>' if body else ""


def _eigenvalues(results: Mapping[str, Any]) -> str:
    """Return the table of eigenvalues with their residuals."""
    lines = [
        [escape(row.label), marked(row.value), marked(row.sureness)]
        for name in ("eigenvalues", "smallest")
        if name in results
        for row in rows(name, results[name])
    ]
    columns = (("", ""), ("value", "number"), ("residual", "number"))
    return section("values", "Eigenvalues", table(columns, lines)) if lines else ""


def _traces(results: Mapping[str, Any]) -> str:
    """Return the table of the trace of each parameter, with bars."""
    by_leaf = results["trace"]["by_leaf"] if "trace" in results else {}
    columns = (("parameter", "name"), ("", "bar"), ("trace", "number"))
    lines = [
        [_breakable(name), bar, marked((Number(value, ".4g"),))]
        for (name, value), bar in zip(by_leaf.items(), _bars(list(by_leaf.values())), strict=True)
    ]
    title = "Trace by parameter"
    return section("traces", title, scrolled(title, table(columns, lines))) if lines else ""


def _breakable(name: str) -> str:
    """Return the name of a parameter as HTML that may break after each dot."""
    return escape(name).replace(".", ".<wbr>")


def _bars(values: list[float | None]) -> Iterator[str]:
    """Yield bars that extend to both sides of a common zero."""
    known = [value or 0.0 for value in values]
    low, high = min([0.0, *known]), max([0.0, *known])
    share = 100 / ((high - low) or 1.0)
    for value in known:
        start, width = share * (min(value, 0.0) - low), share * abs(value)
        kind = "negative" if value < 0 else "positive"
        yield f'<i class="{kind}" style="left:{start:.2f}%;width:{width:.2f}%"></i>'


def run(content: Mapping[str, Any], /) -> str:
    """Return the section with everything that is needed to repeat the run."""
    subject = content["subject"]
    examples = (
        *(Number(subject["examples"], ","), " in "),
        *(Number(subject["batches"], ","), " batch" + "es" * (subject["batches"] > 1)),
    )
    versions = ", ".join(f"{name} {version}" for name, version in content["versions"].items())
    return section(
        "run",
        "What was run",
        facts(
            (
                ("command", f"<code>{escape(content['run']['command'])}</code>"),
                ("target", escape(subject["target"])),
                ("parameters", marked((Number(subject["parameters"], ","),))),
                ("examples", marked(examples)),
                ("precision", escape(f"{subject['dtype']} on {subject['device']}")),
                ("seed", marked((Number(content["run"]["seed"], ""),))),
                ("began", escape(content["run"]["began"])),
                ("versions", escape(versions)),
            )
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
