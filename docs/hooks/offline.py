"""Every page of the site can be read without a network."""

from __future__ import annotations

import re
from typing import Any

from mkdocs.exceptions import PluginError

_ELSEWHERE = re.compile(r'<(?:script|link|img|iframe)\b[^>]*(?:src|href)="(?:https?:)?//[^"]*"')


def on_post_page(output: str, *, page: Any, **kwargs: Any) -> str:
    """Refuse a page that loads anything from elsewhere."""
    found = _ELSEWHERE.search(output)
    if found:
        raise PluginError(f"{page.file.src_uri} needs a network: {found[0]}")
    return output
