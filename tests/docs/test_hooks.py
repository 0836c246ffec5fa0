"""The hooks with which the site is built: tables of results, links of names, nothing from afar."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

pytest.importorskip("mkdocs", reason="the site is built with mkdocs: pip install 'hessfunc[docs]'")
pytest.importorskip("griffe", reason="docstrings are read by griffe: pip install 'hessfunc[docs]'")

from mkdocs.exceptions import PluginError

HOOKS = Path(__file__).parents[2] / "docs" / "hooks"


def hook(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, HOOKS / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    (tmp_path / "speed.md").write_text("# Speed\n\nhead\n\n## One\n\nfirst\n\n## Two\n\nsecond\n")
    (tmp_path / "coverage.md").write_text(
        "| estimator | spectrum | stop | at 80 % | at 95 % | width |\n|---|---|---|---|---|---|\n"
        "| a | i | 30 | 81.0 % | 96.0 % | 1 |\n| a | j | 30 | 80.0 % | 94.0 % | 1 |\n"
        "| a | j | 70 | 83.0 % | 95.0 % | 2 |\n"
    )
    module = hook("measured")
    monkeypatch.setattr(module, "_RESULTS", tmp_path)
    return module


def test_a_table_takes_the_place_of_its_line(measured: ModuleType) -> None:
    assert measured.on_page_markdown("before\n\n{{ speed.md }}\n\nafter").split() == [
        "before",
        "head",
        "after",
    ]
    assert measured.on_page_markdown("{{ speed.md: Two }}").strip() == "second"


def test_coverage_is_told_by_estimator(measured: ModuleType) -> None:
    table = measured.on_page_markdown("{{ coverage.md by estimator }}")
    assert table.splitlines()[0] == "| estimator | at 80 % | at 95 % | cases |"
    assert table.splitlines()[2:] == ["| a | 80.0 % (81.0 %) | 94.0 % (95.0 %) | 3 |"]


@pytest.mark.parametrize("line", ["{{ absent.md }}", "{{ speed.md: Three }}"])
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
