"""Make every page of the site readable, and the search usable, without a network or a server.

Browsers refuse to fetch from ``file://``. The theme then reads the index of the search from the
script ``search/search_index.js``, and ``worker.js`` runs the search.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from mkdocs.exceptions import PluginError

_ELSEWHERE = re.compile(r'<(?:script|link|img|iframe)\b[^>]*(?:src|href)="(?:https?:)?//[^"]*"')


def on_post_page(output: str, *, page: Any, **kwargs: Any) -> str:
    """Raise an error if a page loads a file from another server."""
    reference = _ELSEWHERE.search(output)
    if reference:
        raise PluginError(
            f"{page.file.src_uri} needs a network for {reference[0]}: put the file in the site"
        )
    return output


def on_post_build(*, config: Any, **kwargs: Any) -> None:
    """Write the index of the search as a script."""
    index = Path(config["site_dir"]) / "search" / "search_index.json"
    index.with_suffix(".js").write_text(f"var __index = {index.read_text()}")
