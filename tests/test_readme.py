"""Every Python block of the README runs, in order, as one script, and its links lead somewhere."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.docs.blocks import python_blocks, run

README = Path(__file__).parents[1] / "README.md"


@pytest.mark.slow
def test_blocks_run() -> None:
    blocks = python_blocks(README.read_text())
    assert len(blocks) >= 3
    run(blocks, str(README))


def test_links_lead_somewhere() -> None:
    links = re.findall(r"\]\(([^)#]+)\)", README.read_text())
    assert len(links) > 10
    assert [link for link in links if not (README.parent / link).exists()] == []
