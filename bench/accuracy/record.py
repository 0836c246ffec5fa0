"""What was measured, in JSON, and the tables beside it."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import numpy as np

from bench.accuracy.measuring import Cell, Run
from bench.accuracy.methods import METHODS
from bench.accuracy.tables import markdown
from bench.environment import environment


def read(path: Path) -> dict[str, Cell]:
    if not path.exists():
        return {}
    stored = json.loads(path.read_text())["cells"]
    return {
        key: Cell(**{**cell, "shipped": cell["shipped"] and [Run(**r) for r in cell["shipped"]]})
        for key, cell in stored.items()
    }


def write(path: Path, cells: dict[str, Cell], titles: dict[str, str]) -> str:
    versions = {
        method.package: cell.version
        for method in METHODS
        for key, cell in cells.items()
        if key.endswith(f"/{method.title}")
    }
    about = {**environment(), "numpy": np.__version__, **versions}
    text = markdown(cells, titles, about)
    record = {
        "environment": about,
        "titles": titles,
        "cells": {key: asdict(cell) for key, cell in cells.items()},
    }
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(record, indent=1))
    path.with_suffix(".md").write_text(f"{text}\n")
    return text
