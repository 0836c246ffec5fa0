"""The reference names every public name once, and citing names every source."""

from __future__ import annotations

import inspect
import re
from collections import Counter
from pathlib import Path

import hessfunc as hf

DOCS = Path(__file__).parents[2] / "docs"


def described() -> Counter[str]:
    """How often each public name is described, by its own path or by a module's of its name."""
    pages = "\n".join(page.read_text() for page in sorted((DOCS / "reference").glob("*.md")))
    paths = re.findall(r"^::: hessfunc\.(\w+)(?:\.(\w+))?$", pages, re.MULTILINE)
    return Counter(last or first for first, last in paths if last in ("", first))


def test_every_public_name_is_described_once() -> None:
    assert described() == Counter(hf.__all__)


def test_every_public_name_is_listed_on_the_first_page() -> None:
    listed = re.findall(r"\[`(\w+)`\]\[", (DOCS / "reference" / "index.md").read_text())
    assert Counter(listed) == Counter(hf.__all__)


def test_every_paper_of_a_docstring_can_be_cited() -> None:
    docstrings = []
    for name in hf.__all__:
        public = getattr(hf, name)
        members = vars(public).values() if inspect.isclass(public) else ()
        docstrings += [inspect.getdoc(each) or "" for each in (public, *members)]
    numbers = {n for text in docstrings for n in re.findall(r"arXiv\s+(\d{4}\.\d{5})", text)}
    assert len(numbers) > 20
    entries = re.findall(r"eprint = \{(.*?)\}", (DOCS / "citing.md").read_text())
    assert numbers - set(entries) == set()
    assert len(entries) == len(set(entries))


def test_every_question_of_the_readme_has_its_functions_in_the_long_table() -> None:
    readme = (DOCS.parent / "README.md").read_text()
    table = readme.partition("## Which function for which question")[2].partition("\n## ")[0]
    public = set(hf.__all__)
    short = set(re.findall(r"\w+", " ".join(re.findall(r"`(.*?)`", table)))) & public
    long = set(re.findall(r"\w+", (DOCS / "questions.md").read_text())) & public
    assert len(short) > 30
    assert short - long == set()
