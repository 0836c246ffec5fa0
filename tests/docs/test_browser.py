"""The site in Chromium, opened from a folder: search, menus, colours, and widths."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("mkdocs", reason="the site is built with mkdocs: pip install 'hessfunc[docs]'")
pytest.importorskip("playwright.sync_api", reason="Playwright is not installed")

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from mkdocs.commands.build import build
    from mkdocs.config import load_config

    folder = tmp_path_factory.mktemp("site")
    build(load_config(str(ROOT / "mkdocs.yml"), site_dir=str(folder)))
    return folder


def opened(browser: Any, page: Path, width: int = 1280, **options: Any) -> Any:
    tab = browser.new_context(viewport={"width": width, "height": 900}, **options).new_page()
    tab.goto(page.as_uri())
    return tab


@pytest.mark.parametrize("name", ["index.html", "how-to/layers.html"])
def test_search_needs_no_server(browser: Any, site: Path, name: str) -> None:
    tab = opened(browser, site / name)
    tab.click(".md-search__input")
    tab.keyboard.type("block spectra")
    tab.wait_for_selector(".md-search-result a[href*='reference/densities.html']")


def test_sections_fold_and_colours_switch(browser: Any, site: Path) -> None:
    tab = opened(browser, site / "index.html", color_scheme="dark")
    entry = tab.get_by_role("link", name="Any batch, any model")
    assert not entry.is_visible()
    tab.locator(".md-nav--primary label", has_text="How to").first.click()
    entry.wait_for(state="visible")

    def background() -> str:
        return str(tab.evaluate("getComputedStyle(document.body).backgroundColor"))

    dark = background()
    tab.locator(".md-header label[title*='light']").click()
    assert background() != dark


@pytest.mark.parametrize("width", [1280, 390])
def test_no_page_is_wider_than_the_window(browser: Any, site: Path, width: int) -> None:
    tab = opened(browser, site / "index.html", width)
    for page in sorted(site.rglob("*.html")):
        tab.goto(page.as_uri())
        assert tab.evaluate("document.documentElement.scrollWidth") <= width, page
        if width == 1280:
            lengths = tab.evaluate(
                "[...document.querySelectorAll('.md-content pre code')]"
                ".map(code => code.scrollWidth - code.clientWidth)"
            )
            assert max(lengths, default=0) <= 0, page
