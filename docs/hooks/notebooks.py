"""Offer every tutorial as a Jupyter notebook, made from its page when the site is built.

Text becomes a Markdown cell and each Python block a code cell. Links within the site become plain
text, because a downloaded notebook stands alone.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File

_FOLDER = "tutorials/"
_BLOCK = re.compile(r"^```python\n(.*?)^```$", re.DOTALL | re.MULTILINE)
# [text](page.md) and [text][hessfunc.name], but neither ![picture](...) nor [paper](https://...).
_LINK = re.compile(r"(?<!!)\[([^\]]+)\](?:\((?!https?:)[^)]*\)|\[[\w.]+\])")


def notebook(markdown: str) -> dict[str, Any]:
    """Return the notebook of a page, in version 4.5 of the format."""
    cells = []
    # The pattern has one group: text and code alternate.
    for i, part in enumerate(_BLOCK.split(markdown)):
        text = part.strip("\n")
        if not text:
            continue
        cell: dict[str, Any] = {"id": f"cell-{i}", "metadata": {}}
        if i % 2:
            cell |= {"cell_type": "code", "execution_count": None, "outputs": [], "source": text}
        else:
            cell |= {"cell_type": "markdown", "source": _LINK.sub(r"\1", text)}
        cells.append(cell)
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    return {
        "nbformat": 4,
        "nbformat_minor": 5,
        "metadata": {"kernelspec": kernel, "language_info": {"name": "python"}},
        "cells": cells,
    }


def on_files(files: Any, *, config: Any) -> Any:
    """Add the notebooks to the files of the site."""
    for page in files.documentation_pages():
        if page.src_uri.startswith(_FOLDER):
            content = json.dumps(notebook(page.content_string), indent=1)
            name = str(Path(page.src_uri).with_suffix(".ipynb"))
            files.append(File.generated(config, name, content=content))
    return files


def on_page_markdown(markdown: str, *, page: Any, **kwargs: Any) -> str:
    """Link a tutorial to its notebook, below the title."""
    if not page.file.src_uri.startswith(_FOLDER):
        return markdown
    title, _, text = markdown.partition("\n")
    link = f"[Download this page as a notebook]({Path(page.file.src_uri).stem}.ipynb)"
    return f"{title}\n\n{link}\n{text}"
