"""Building blocks of HTML pages."""

from __future__ import annotations

import io
import json
from base64 import b64encode
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from importlib.resources import files
from string import Template
from typing import Any

from matplotlib.figure import Figure

from hessfunc.app.report.content import as_text
from hessfunc.app.report.rows import Number, Row, Words


def marked(words: Words, /) -> str:
    """Return words as HTML, with each number in a ``data`` element that has its full value.

    The text of a number has the minus sign of mathematics; its value has that of JSON.
    """
    return "".join(
        f'<data value="{json.dumps(word.value)}">{escape(_signed(str(word)))}</data>'
        if isinstance(word, Number)
        else escape(word)
        for word in words
    )


def _signed(text: str) -> str:
    return text.replace("-", "\N{MINUS SIGN}")


def section(name: str, title: str, *body: str) -> str:
    """Return a section of the page with a heading."""
    lines = "\n".join(body)
    return (
        f'<section id="{name}" aria-labelledby="{name}-title">\n'
        f'<h2 id="{name}-title">{escape(title)}</h2>\n{lines}\n</section>'
    )


def table(columns: Sequence[tuple[str, str]], lines: Iterable[Sequence[str]], /) -> str:
    """Return a table; the first cell of each row is the header of the row.

    Args:
        columns: Title and CSS class of each column.
        lines: Rows of cells, each cell HTML.
    """
    kinds = [kind for _, kind in columns]
    head = "".join(f'<th scope="col" class="{k}">{escape(title)}</th>' for title, k in columns)
    body = "\n".join(f"<tr>{_cells(line, kinds)}</tr>" for line in lines)
    return f"<table>\n<thead><tr>{head}</tr></thead>\n<tbody>\n{body}\n</tbody>\n</table>"


def _cells(line: Sequence[str], kinds: Sequence[str]) -> str:
    first = f'<th scope="row" class="{kinds[0]}">{line[0]}</th>'
    others = zip(line[1:], kinds[1:], strict=True)
    return first + "".join(f'<td class="{kind}">{cell}</td>' for cell, kind in others)


def command(line: str, /) -> str:
    """Return a command line that is broken between its words only, not after a hyphen."""
    words = " ".join(f"<span>{escape(word)}</span>" for word in line.split(" "))
    return f"<code>{words}</code>"


def scrolled(name: str, body: str, /) -> str:
    """Return possibly long HTML in a frame that can be scrolled, also with the keyboard."""
    return f'<div class="scroll" role="group" tabindex="0" aria-label="{escape(name)}">{body}</div>'


def cards(rows: Iterable[Row], /) -> str:
    """Return the cards with the main numbers, each with its uncertainty."""
    shown = "".join(
        f"<div><dt>{escape(row.label)}</dt><dd>{marked(row.value)}</dd>"
        f'<dd class="sureness">{marked(row.sureness)}</dd></div>\n'
        for row in rows
    )
    return f'<dl class="headlines">\n{shown}</dl>'


def said(sentence: Words, /) -> str:
    """Return a sentence below a title, or nothing."""
    return f'<p class="meaning">{marked(sentence)}</p>\n' if sentence else ""


def figure(name: str, title: str, sentence: Words, picture: bytes | None, /) -> str:
    """Return a figure that scripts draw, and its picture for browsers without scripts."""
    still = "This figure requires JavaScript." if picture is None else image(picture, title)
    return (
        f'<figure id="{name}" aria-labelledby="{name}-title">\n'
        f'<h2 id="{name}-title">{escape(title)}</h2>\n{said(sentence)}'
        f"<noscript>{still}</noscript>\n</figure>\n"
    )


def facts(name: str, title: str, pairs: Iterable[tuple[str, Words | str]], /) -> str:
    """Return a section with a list of names and their values: words, or a string of HTML."""
    shown = ((key, fact if isinstance(fact, str) else marked(fact)) for key, fact in pairs)
    lines = "\n".join(f"<div><dt>{escape(key)}</dt><dd>{fact}</dd></div>" for key, fact in shown)
    return section(name, title, f'<dl class="facts">\n{lines}\n</dl>')


def what_was_run(content: Mapping[str, Any], pairs: Iterable[tuple[str, Words]], /) -> str:
    """Return the section with everything that is needed to repeat a run.

    Args:
        content: Plain data of the run, with its invocation and its versions.
        pairs: Names and values of its settings.
    """
    run = content["run"]
    versions = ", ".join(f"{name} {version}" for name, version in content["versions"].items())
    return facts(
        "run",
        "What was run",
        (
            ("command", command(run["command"])),
            *pairs,
            ("began", (run["began"],)),
            ("versions", (versions,)),
        ),
    )


def image(picture: bytes, description: str, /) -> str:
    """Return an ``img`` element with the PNG inline."""
    source = f"data:image/png;base64,{b64encode(picture).decode()}"
    return f'<img alt="{escape(description)}" src="{source}">'


def png(figure: Figure, /) -> bytes:
    """Return a picture of a figure of Matplotlib."""
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=200)
    return file.getvalue()


_ASSETS = files("hessfunc.app.report") / "assets"


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
    """Return a page with styles, scripts and data inline, which needs no network.

    Args:
        content: Plain data, embedded as JSON.
        title: Title of the page.
        kind: Kind of the page, shown above the title.
        status: Status of the run.
        headline: Line below the title.
        parts: Sections as HTML; empty ones are left out.
        scripts: Names of script assets, which run as one module.
    """
    script = "\n".join(_asset(f"{name}.js") for name in scripts)
    return Template(_asset("page.html")).substitute(
        title=escape(title),
        kind=escape(kind),
        status=escape(status),
        headline=marked(headline),
        parts="\n".join(filter(None, parts)),
        style=_asset("page.css"),
        # A JSON string may contain </script>, which would end the element.
        content=as_text(content).replace("<", "\\u003c"),
        script=f'<script type="module">\n{script}</script>\n' if script else "",
    )


def _asset(name: str) -> str:
    return (_ASSETS / name).read_text(encoding="utf-8")
