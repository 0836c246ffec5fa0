"""Metadata that depend on the address of the repository: the URLs of the project, and its README.

``[tool.hatch.metadata.hooks.custom] repository`` in ``pyproject.toml`` is the address, and the only
place of it. Links of the README lead to files of the repository. They are absolute in the metadata,
since an index of packages shows the README without these files.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from hatchling.metadata.plugin.interface import MetadataHookInterface

# Link or image to a file: neither an address nor a heading of the same page.
_TO_FILE = re.compile(r"(!?)\[([^\]]*)\]\((?![a-z]+:|#)([^)\s]+)\)")


def urls(repository: str, /) -> dict[str, str]:
    """Return the URLs of the project by their labels; none without an address."""
    if not repository:
        return {}
    return {
        "Homepage": repository,
        "Documentation": f"{repository}/blob/main/docs/index.md",
        "Changelog": f"{repository}/blob/main/CHANGELOG.md",
        "Issues": f"{repository}/issues",
        "Source": repository,
    }


def absolute(text: str, repository: str, version: str, /) -> str:
    """Return Markdown whose links to files lead to the repository at the tag of the version."""
    if not repository:
        return text

    def link(found: re.Match[str]) -> str:
        mark, label, path = found.groups()
        kind = "raw" if mark else "blob"
        return f"{mark}[{label}]({repository}/{kind}/v{version}/{path})"

    return _TO_FILE.sub(link, text)


class CustomMetadataHook(MetadataHookInterface):
    """Hook of hatchling, with the option ``repository``."""

    def update(self, metadata: dict[str, Any]) -> None:
        """Add the URLs and the README."""
        root = Path(self.root)
        repository = str(self.config.get("repository", "")).rstrip("/")
        source = (root / "hessfunc" / "__init__.py").read_text()
        version = re.findall(r'^__version__ = "(.+)"$', source, re.MULTILINE)[0]
        metadata["urls"] = urls(repository)
        metadata["readme"] = {
            "content-type": "text/markdown",
            "text": absolute((root / "README.md").read_text(), repository, version),
        }
