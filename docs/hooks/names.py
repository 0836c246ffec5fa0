"""Public names in docstrings, such as `lanczos`, become links to where they are described."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import griffe

_STUB = Path(__file__).parents[2] / "hessfunc" / "__init__.pyi"
_NAME = re.compile(r"(?<!`)`(\w+)`(?!`)")


class Names(griffe.Extension):
    """Rewrites the docstring of each object."""

    def __init__(self) -> None:
        self._public = set(re.findall(r" as (\w+)", _STUB.read_text()))

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = _NAME.sub(self._linked, obj.docstring.value)

    def _linked(self, found: re.Match[str]) -> str:
        return f"[{found[0]}][hessfunc.{found[1]}]" if found[1] in self._public else found[0]
