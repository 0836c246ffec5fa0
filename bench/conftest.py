"""Collects what the benchmarks have measured, prints the tables at the end, and writes them.

Each run adds one Markdown and one JSON file, named by its date, to bench/results/, which git
ignores: a table belongs to one machine on one day.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from bench.report import Measured, write

_RESULTS = pytest.StashKey[list[Measured]]()
_FOLDER = Path(__file__).parent / "results"


@pytest.fixture
def record(request: pytest.FixtureRequest) -> Callable[[Measured], None]:
    """Adds one result to the tables."""
    return request.config.stash.setdefault(_RESULTS, []).append


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    """The tables."""
    results = config.stash.get(_RESULTS, [])
    if results:
        text, path = write(results, _FOLDER)
        terminalreporter.write_line("")
        terminalreporter.write_line(text)
        terminalreporter.write_line(f"\nwritten to {path} and .json")
