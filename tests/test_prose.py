"""The prose of the project: how docstrings, comments, messages, help texts and pages are written.

A summary line stands alone: it opens with a verb, an article or a noun, never with a preposition or
a pronoun. A description of an argument or attribute opens with a capital letter and a noun, an
adjective or "Whether". Terms of the field have one name each.
"""

from __future__ import annotations

import ast
import re
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest

import hessfunc

SOURCES = Path(hessfunc.__file__).parent
ROOT = SOURCES.parent

# Words with which neither a summary nor a description may open.
OPENINGS = frozenset(
    [
        "of",
        "in",
        "from",
        "as",
        "so",
        "what",
        "where",
        "with",
        "that",
        "it",
        "those",
        "which",
        "one",
        "by",
        "to",
        "for",
        "at",
        "on",
        "than",
        "these",
        "this",
        "how",
        "who",
        "whoever",
        "whose",
        "what's",
        "there",
        "they",
        "them",
        "its",
    ]
)
SAME = re.compile(r"the same(?! \w)", re.IGNORECASE)
# Phrases that paraphrase a term of the field, with the term.
PHRASES = {
    r"\bgo(es|ing)? on from\b": "resume",
    r"\btaken up again\b": "resumed",
    r"\bwrit(e|es|ten) (it )?down\b": "materialise",
    r"\bis spent\b": "budget exhausted",
    r"\bnarrow enough\b": "tolerance reached",
    r"\bleft as it is\b": "tolerance not reached",
    r"\bwhole on (each|every) rank\b": "replicated",
    r"\bas it is\b": "name what is meant",
    r"\bmade? anew\b": "recompute",
    r"\bone on the mesh is due\b": "tensor on the mesh",
    r"\bis due\b": "is expected",
    r"\bare due\b": "are expected",
    r"\bfaces? of (other|another)\b": "drop-in replacement",
    r"\bas many as\b": "give the number",
    r"\bwhat is left\b": "name what remains",
    r"\bthose that are there\b": "name them",
}
SECTION = re.compile(r"(Args|Attributes|Returns|Raises|Yields):$")
ENTRY = re.compile(r"    (\*{0,2}[\w., ]+?):(?: (.*))?$")

# Parts of the project that are held to it.
PARTS = ["hessfunc", "docs", "examples", "README.md", "CONTRIBUTING.md"]


def openings(text: str) -> str | None:
    """Return a word with which the text must not open."""
    words = re.findall(r"[A-Za-z']+", text[:80])
    first = words[0].lower() if words else ""
    if first in OPENINGS and not text.startswith("`"):
        return first
    return "the same" if SAME.match(text) else None


def entries(docstring: str) -> Iterator[tuple[str, str]]:
    """Yield the name and the description of each entry of the sections of a docstring."""
    inside = False
    for line in docstring.splitlines():
        if SECTION.match(line):
            inside = True
        elif line and not line.startswith(" "):
            inside = False
        elif inside and (entry := ENTRY.match(line)) and entry[2]:
            yield entry[1], entry[2]


def phrases(text: str) -> Iterator[str]:
    """Yield a complaint for each phrase that paraphrases a term."""
    flat = re.sub(r"\s+", " ", text)
    for pattern, term in PHRASES.items():
        if found := re.search(pattern, flat, re.IGNORECASE):
            yield f"{found[0]!r}: {term}"


def of_docstring(name: str, docstring: str) -> Iterator[str]:
    """Yield the complaints about one docstring."""
    docstring = docstring.strip()
    if word := openings(docstring):
        yield f"{name} opens with {word!r}: {docstring.splitlines()[0]}"
    for entry, description in entries(docstring):
        if word := openings(description):
            yield f"{name}, {entry}, opens with {word!r}: {description}"
        elif description[0].islower():
            yield f"{name}, {entry}, opens in lower case: {description}"
    yield from (f"{name}: {complaint}" for complaint in phrases(docstring))


def of_source(path: Path) -> Iterator[str]:
    """Yield the complaints about the docstrings, comments and messages of a source file."""
    text = path.read_text()
    docstrings = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            docstring = ast.get_docstring(node, clean=True)
            if docstring is not None:
                docstrings.add(node.body[0].lineno)
                yield from of_docstring(getattr(node, "name", path.stem), docstring)
    for node in ast.walk(ast.parse(text)):
        if not (isinstance(node, ast.Constant) and isinstance(node.value, str)):
            continue
        if node.lineno not in docstrings:
            yield from (f"line {node.lineno}: {found}" for found in phrases(node.value))
    with path.open("rb") as stream:
        comments = [t for t in tokenize.tokenize(stream.readline) if t.type == tokenize.COMMENT]
    for comment in comments:
        yield from (f"line {comment.start[0]}: {found}" for found in phrases(comment.string))


def of_page(path: Path) -> Iterator[str]:
    """Yield the complaints about a page of the documentation."""
    prose = re.sub(r"```.*?```", "", path.read_text(), flags=re.DOTALL)
    for paragraph in re.split(r"\n\s*\n", prose):
        plain = paragraph.strip()
        if not plain or plain[0] in "|#<:!-*[(0123456789":
            continue
        # A sentence may open with "In" or "For" in running text; a fragment may not.
        if (word := openings(plain)) in {"of", "that", "those", "which", "it", "what", "so", "as"}:
            yield f"a paragraph opens with {word!r}: {plain.splitlines()[0]}"
    yield from phrases(prose)


def held() -> list[Path]:
    """Return the files that are held to the rules."""
    files = [file for part in PARTS for file in sorted((ROOT / part).rglob("*"))]
    files += [ROOT / part for part in PARTS if (ROOT / part).is_file()]
    return [file for file in files if file.suffix in (".py", ".md")]


@pytest.mark.parametrize("file", held(), ids=lambda file: str(file.relative_to(ROOT)))
def test_prose(file: Path) -> None:
    complaints = list(of_source(file) if file.suffix == ".py" else of_page(file))
    assert not complaints, "\n".join(complaints)


@pytest.mark.parametrize(
    ("docstring", "complaint"),
    [
        ("From what an activation was computed.", "opens with 'from'"),
        ("The same where bases come from afar.", None),
        ("Return the leaves.\n\nArgs:\n    seed: of the start.", "seed, opens with 'of'"),
        ("Return the leaves.\n\nArgs:\n    seed: seed of it.", "seed, opens in lower case"),
        ("Keep a state to go on from.", "resume"),
        ("Return the leaves.\n\nArgs:\n    seed: Seed of the start vector.", None),
    ],
)
def test_the_rules(docstring: str, complaint: str | None) -> None:
    complaints = list(of_docstring("it", docstring))
    assert bool(complaints) == (complaint is not None)
    assert complaint is None or complaint in complaints[0]
