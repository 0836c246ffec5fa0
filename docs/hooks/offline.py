"""Check that every page of the site can be read without a network."""

from __future__ import annotations

import re
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
