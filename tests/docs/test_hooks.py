"""The hooks with which the site is built: tables, links, notebooks and summaries."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

pytest.importorskip("mkdocs", reason="the site is built with mkdocs: pip install 'hessfunc[docs]'")
pytest.importorskip("griffe", reason="docstrings are read by griffe: pip install 'hessfunc[docs]'")

from mkdocs.exceptions import PluginError

from tests.docs.blocks import python_blocks

DOCS = Path(__file__).parents[2] / "docs"
HOOKS = DOCS / "hooks"
TUTORIALS = sorted((DOCS / "tutorials").glob("*.md"))


def hook(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, HOOKS / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    (tmp_path / "accuracy.md").write_text(
        "# Accuracy\n\nhead\n\n## One\n\nfirst\n\n## Two\n\nsecond\n"
    )
    for folder, ours in {"a-cpu": "1.00", "b-cpu": "2.00"}.items():
        (tmp_path / "speed" / folder).mkdir(parents=True)
        (tmp_path / "speed" / folder / "costs.png").touch()
        (tmp_path / "speed" / folder / "speed.md").write_text(
            f"# Speed\n\nmachine: {folder}, torch: 2\n\n"
            "| work | net | ours / best peer | ours | floor |\n|---|---|---|---|---|\n"
            f"| one product | GPT 4 x 128 | {ours} | {ours} (1-2) | 2.00 |\n\n## More\n\nrows\n"
        )
    (tmp_path / "coverage.md").write_text(
        "| estimator | spectrum | stop | at 80 % | at 95 % | width |\n|---|---|---|---|---|---|\n"
        "| a | i | 30 | 81.0 % | 96.0 % | 1 |\n| a | j | 30 | 80.0 % | 94.0 % | 1 |\n"
        "| a | j | 70 | 83.0 % | 95.0 % | 2 |\n"
    )
    module = hook("measured")
    monkeypatch.setattr(module, "_RESULTS", tmp_path)
    return module


def test_a_table_takes_the_place_of_its_line(measured: ModuleType) -> None:
    assert measured.on_page_markdown("before\n\n{{ accuracy.md }}\n\nafter").split() == [
        "before",
        "head",
        "after",
    ]
    assert measured.on_page_markdown("{{ accuracy.md: Two }}").strip() == "second"


def test_coverage_is_told_by_estimator(measured: ModuleType) -> None:
    table = measured.on_page_markdown("{{ coverage.md by estimator }}")
    assert table.splitlines()[0] == "| estimator | at 80 % | at 95 % | cases |"
    assert table.splitlines()[2:] == ["| a | 80.0 % (81.0 %) | 94.0 % (95.0 %) | 3 |"]


def test_machines_are_compared_and_have_a_section_each(measured: ModuleType) -> None:
    line = measured.on_page_markdown("{{ speed by machine }}").splitlines()[2]
    cells = [cell.strip() for cell in line.strip("|").split("|")]
    assert cells[:5] == ["Hessian", "GPT 4 x 128", "2.00", "1.00", "2.00"]
    assert cells[5:] == ["0.50 to 1.00", "1.00 to 2.00"]
    sections = measured.on_page_markdown("{{ speed of each machine }}")
    assert re.findall(r"^### (.*)$", sections, re.MULTILINE) == ["a-cpu", "b-cpu"]
    assert "rows" not in sections
    assert "costs.png" not in sections
    charts = measured.on_page_markdown("{{ speed in charts }}")
    assert re.findall(r"\((.*?)\)", charts) == [
        "images/a-cpu-costs.png",
        "images/b-cpu-costs.png",
    ]


@pytest.mark.parametrize("line", ["{{ absent.md }}", "{{ accuracy.md: Three }}"])
def test_what_is_missing_is_an_error(measured: ModuleType, line: str) -> None:
    with pytest.raises(PluginError, match="absent|Three"):
        measured.on_page_markdown(line)


def test_public_names_become_links() -> None:
    import griffe

    docstring = griffe.Docstring("As `lanczos`, with ``lanczos`` and `nothing_public`.")
    hook("names").Names().on_object(obj=SimpleNamespace(docstring=docstring))
    assert docstring.value == (
        "As [`lanczos`][hessfunc.lanczos], with ``lanczos`` and `nothing_public`."
    )


def test_a_page_that_needs_a_network_is_refused() -> None:
    offline = hook("offline")
    page = SimpleNamespace(file=SimpleNamespace(src_uri="index.md"))
    link = '<a href="https://arxiv.org/abs/2301.07825">a paper</a>'
    assert offline.on_post_page(link, page=page) == link
    for tag in ('<script src="https://a.b/c.js">', '<link rel="x" href="//a.b/c.css">'):
        with pytest.raises(PluginError, match=r"index\.md"):
            offline.on_post_page(tag, page=page)


def test_the_index_of_the_search_is_a_script(tmp_path: Path) -> None:
    index = tmp_path / "search" / "search_index.json"
    index.parent.mkdir()
    index.write_text('{"docs": []}')
    hook("offline").on_post_build(config={"site_dir": str(tmp_path)})
    assert index.with_suffix(".js").read_text() == 'var __index = {"docs": []}'


@pytest.mark.parametrize("address", ["", "https://example.org/hessfunc"])
def test_the_site_links_to_the_repository(address: str, tmp_path: Path) -> None:
    table = "[tool.hatch.metadata.hooks.custom]"
    (tmp_path / "pyproject.toml").write_text(f'{table}\nrepository = "{address}"\n')

    class Config(dict[str, str | None]):
        config_file_path = str(tmp_path / "mkdocs.yml")

    assert hook("repository").on_config(Config()) == {"repo_url": address or None}


@pytest.mark.parametrize("page", TUTORIALS, ids=lambda page: page.stem)
def test_a_notebook_has_the_text_and_the_code_of_its_page(page: Path) -> None:
    text = page.read_text()
    notebook = hook("notebooks").notebook(text)
    assert (notebook["nbformat"], notebook["nbformat_minor"]) == (4, 5)
    cells = notebook["cells"]
    code = [cell["source"] + "\n" for cell in cells if cell["cell_type"] == "code"]
    assert code == python_blocks(text)
    assert cells[0]["source"].startswith(text.partition("\n")[0])
    assert not any(".md)" in cell["source"] for cell in cells)
    assert len({cell["id"] for cell in cells}) == len(cells)


def test_tutorials_link_to_their_notebooks() -> None:
    page = SimpleNamespace(file=SimpleNamespace(src_uri="tutorials/hbp.md"))
    text = hook("notebooks").on_page_markdown("# Title\n\ntext", page=page)
    assert text == "# Title\n\n[Download this page as a notebook](hbp.ipynb)\n\ntext"


def page(title: str, text: str, summaries: ModuleType) -> SimpleNamespace:
    name = f"{title.lower()}.md"
    made = SimpleNamespace(
        is_page=True, title=title, url=name, meta={}, file=SimpleNamespace(src_uri=name)
    )
    summaries.on_page_markdown(text, page=made)
    return made


def test_pages_are_listed_with_their_first_sentences(tmp_path: Path) -> None:
    summaries = hook("summaries")
    first = page(
        "Start", "# Title\n\n![a](b)\n\n```\n# No.\n```\n\nIt [links](x). More.", summaries
    )
    second = page("Two", "# Title\n\nA tolerance of 0.1 suffices.", summaries)
    section = SimpleNamespace(is_page=False, title="Section", children=[second])
    summaries.on_nav(SimpleNamespace(items=[first, section]))
    config = {"site_dir": str(tmp_path), "site_name": "name", "site_description": "what"}
    summaries.on_post_build(config=config)
    assert (tmp_path / "llms.txt").read_text() == (
        "# name\n\n> what\n\n- [Start](start.md): It links.\n"
        "\n## Section\n\n- [Two](two.md): A tolerance of 0.1 suffices.\n"
    )
    with pytest.raises(PluginError, match=r"three\.md"):
        page("Three", "# Title\n\n| a |\n|---|", summaries)
