"""Every Python block of every page runs, in order, one script a page, and fits beside the menus."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.datapath import DATA, data_file
from tests.docs.blocks import python_blocks, run

DOCS = Path(__file__).parents[2] / "docs"
# tests/distributed/test_docs.py runs them on two processes.
ON_RANKS = {"many-ranks.md", "sharded-parameters.md"}
LIBRARIES = ("accelerate", "matplotlib", "pandas", "pytorch_lightning", "transformers")


def scripts() -> dict[str, list[str]]:
    pages = {page.relative_to(DOCS).as_posix(): page for page in sorted(DOCS.rglob("*.md"))}
    found = {name: python_blocks(page.read_text()) for name, page in pages.items()}
    return {name: blocks for name, blocks in found.items() if blocks and name not in ON_RANKS}


@pytest.fixture(autouse=True)
def figures(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("MPLBACKEND", "Agg")
    yield
    if "matplotlib.pyplot" in sys.modules:
        sys.modules["matplotlib.pyplot"].close("all")


@pytest.mark.slow
# Lightning's own use of torch, and its advice.
@pytest.mark.filterwarnings("ignore:.*LeafSpec.* is deprecated:FutureWarning")
@pytest.mark.filterwarnings("ignore:.*does not have many workers")
@pytest.mark.parametrize("page", scripts())
def test_a_page_runs(page: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    text = (DOCS / page).read_text()
    for library in LIBRARIES:
        if re.search(rf"\b{library}\b", text):
            pytest.importorskip(library, reason=f"{library} is not installed")
    if "HESSFUNC_DATA" in text:
        data_file("resnet20_cifar10/resnet20-12fca82f.th")
        monkeypatch.setenv("HESSFUNC_DATA", str(DATA))
    monkeypatch.chdir(tmp_path)
    run(scripts()[page], page)


def test_all_pages_are_found() -> None:
    assert {"start.md", "concepts/spectrum.md", "tutorials/pyhessian.md"} <= scripts().keys()


@pytest.mark.parametrize("page", [DOCS.parent / "README.md", *sorted(DOCS.rglob("*.md"))])
def test_code_fits_into_88_columns(page: Path) -> None:
    blocks = re.findall(r"^```\w*\n(.*?)^```$", page.read_text(), re.DOTALL | re.MULTILINE)
    assert [line for block in blocks for line in block.splitlines() if len(line) > 88] == []
