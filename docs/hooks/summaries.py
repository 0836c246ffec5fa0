"""Describe each page by its first sentence, in its header and in ``llms.txt``.

``llms.txt`` (https://llmstxt.org) lists the pages of the site in the order of the navigation, for
programs that read it as text.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from mkdocs.exceptions import PluginError

_CODE = re.compile(r"^```.*?^```$|^    .*$", re.DOTALL | re.MULTILINE)
# Titles, tables, pictures, captions, lists, HTML and directives.
_NO_TEXT = tuple("#|!*<-:{")
_LINK = re.compile(r"\[([^\]]*)\](?:\([^)]*\)|\[[\w.]*\])")
_SENTENCE = re.compile(r".*?[.:](?=\s+[A-Z0-9`]|$)")
_navigation: list[Any] = []


def summary(markdown: str) -> str:
    """Return the first sentence of the running text of a page; "" without one."""
    for paragraph in re.split(r"\n\s*\n", _CODE.sub("", markdown)):
        text = " ".join(_LINK.sub(r"\1", paragraph).split())
        if paragraph.strip() and not paragraph.strip().startswith(_NO_TEXT):
            sentence = _SENTENCE.match(text)
            return text if sentence is None else sentence[0][:-1] + "."
    return ""


def on_nav(nav: Any, **kwargs: Any) -> None:
    """Keep the navigation for the list of pages."""
    _navigation[:] = nav.items


def on_page_markdown(markdown: str, *, page: Any, **kwargs: Any) -> None:
    """Set the description of a page that has none."""
    text = page.meta.setdefault("description", summary(markdown))
    if not text:
        raise PluginError(f"{page.file.src_uri} has no sentence that describes it")


def on_post_build(*, config: Any, **kwargs: Any) -> None:
    """Write ``llms.txt``."""
    head = f"# {config['site_name']}\n\n> {config['site_description']}\n\n"
    (Path(config["site_dir"]) / "llms.txt").write_text(head + "".join(listed(_navigation)))


def listed(items: Iterable[Any]) -> Iterable[str]:
    """Yield a line for each page, and a heading for each section."""
    # A page after a section would otherwise seem to belong to it.
    for item in sorted(items, key=lambda item: not item.is_page):
        if item.is_page:
            yield f"- [{item.title}]({item.url}): {item.meta['description']}\n"
        else:
            yield f"\n## {item.title}\n\n"
            yield from listed(item.children)
