"""Link public names in docstrings, such as `lanczos`, to their entries in the reference."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import griffe

_REFERENCE = Path(__file__).parents[1] / "reference"
_NAME = re.compile(r"(?<!`)`(\w+)`(?!`)")


class Names(griffe.Extension):
    """Griffe extension that adds the links to the docstring of each object."""

    def __init__(self) -> None:
        pages = "\n".join(page.read_text() for page in _REFERENCE.glob("*.md"))
        paths = re.findall(r"^::: (hessfunc\.[\w.]+)$", pages, re.MULTILINE)
        # Later entries replace earlier ones, so the shortest path of a name is used.
        paths.sort(key=len, reverse=True)
        self._paths = {path.rpartition(".")[2]: path for path in paths}

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = _NAME.sub(self._linked, obj.docstring.value)

    def _linked(self, match: re.Match[str]) -> str:
        path = self._paths.get(match[1])
        return match[0] if path is None else f"[{match[0]}][{path}]"
