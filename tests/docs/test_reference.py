"""The reference names every public name once, and citing names every source."""

from __future__ import annotations

import inspect
import re
from collections import Counter
from pathlib import Path

import pytest

import hessfunc as hf
from hessfunc import plot
from tests import public

DOCS = Path(__file__).parents[2] / "docs"


def described() -> Counter[str]:
    """Return how often each public name is described, by its path below the package."""
    pages = "\n".join(page.read_text() for page in sorted((DOCS / "reference").glob("*.md")))
    paths = Counter(re.findall(r"^::: hessfunc\.([\w.]+)$", pages, re.MULTILINE))
    return Counter({name: count for name, count in paths.items() if name in public.names()})


def test_every_public_name_is_described_once() -> None:
    assert set(hf._HOMES) <= described().keys()
    assert set(described().values()) == {1}


def test_every_described_name_is_listed_on_the_first_page() -> None:
    index = (DOCS / "reference" / "index.md").read_text()
    assert Counter(re.findall(r"\[`\w+`\]\[hessfunc\.([\w.]+)\]", index)) == described()


def test_every_paper_of_a_docstring_can_be_cited() -> None:
    docstrings = []
    for value in public.names().values():
        members = vars(value).values() if inspect.isclass(value) else ()
        docstrings += [inspect.getdoc(each) or "" for each in (value, *members)]
    numbers = {n for text in docstrings for n in re.findall(r"arXiv\s+(\d{4}\.\d{5})", text)}
    assert len(numbers) > 20
    entries = re.findall(r"eprint = \{(.*?)\}", (DOCS / "citing.md").read_text())
    assert numbers - set(entries) == set()
    assert len(entries) == len(set(entries))


def test_every_question_of_the_readme_has_its_functions_in_the_long_table() -> None:
    readme = (DOCS.parent / "README.md").read_text()
    table = readme.partition("## Which function for which question")[2].partition("\n## ")[0]
    known = {name.rpartition(".")[2] for name in public.names()}
    short = set(re.findall(r"\w+", " ".join(re.findall(r"`(.*?)`", table)))) & known
    long = set(re.findall(r"\w+", (DOCS / "questions.md").read_text())) & known
    assert len(short) > 25
    assert short - long == set()


@pytest.mark.parametrize("name", plot.__all__)
def test_every_plot_is_shown_where_it_is_described(name: str) -> None:
    picture = f"images/plot-{name}.png"
    assert (DOCS / picture).exists()
    for page in ("gallery.md", "reference/plot.md", "how-to/pictures.md"):
        assert picture in (DOCS / page).read_text(), page


def test_the_gallery_shows_every_example_that_is_drawn_for_it() -> None:
    loop = re.search(r"^for name in (.*); do$", (DOCS.parent / ".ci/pictures").read_text(), re.M)
    assert loop is not None
    gallery = (DOCS / "gallery.md").read_text()
    for name in loop[1].split():
        assert (DOCS / f"images/{name}.png").exists()
        assert f"(images/{name}.png)" in gallery
        assert f"python examples/{name}.py\n" in gallery
