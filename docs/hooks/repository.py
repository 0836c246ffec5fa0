"""Link the site to the repository, at the address in ``pyproject.toml``."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any


def on_config(config: Any, **kwargs: Any) -> Any:
    """Set the address of the repository, from which every page gets a link; none without one."""
    project = tomllib.loads((Path(config.config_file_path).parent / "pyproject.toml").read_text())
    address = project["tool"]["hatch"]["metadata"]["hooks"]["custom"]["repository"]
    config["repo_url"] = address or None
    return config
