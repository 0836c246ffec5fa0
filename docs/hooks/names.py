"""Public names in docstrings, such as `lanczos`, become links to where they are described."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import griffe

_REFERENCE = Path(__file__).parents[1] / "reference"
_NAME = re.compile(r"(?<!`)`(\w+)`(?!`)")


class Names(griffe.Extension):
    """Rewrites the docstring of each object."""

    def __init__(self) -> None:
        pages = "\n".join(page.read_text() for page in _REFERENCE.glob("*.md"))
        paths = re.findall(r"^::: (hessfunc\.[\w.]+)$", pages, re.MULTILINE)
        # The shortest path of a name wins.
        paths.sort(key=len, reverse=True)
        self._paths = {path.rpartition(".")[2]: path for path in paths}

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = _NAME.sub(self._linked, obj.docstring.value)

    def _linked(self, found: re.Match[str]) -> str:
        path = self._paths.get(found[1])
        return found[0] if path is None else f"[{found[0]}][{path}]"
