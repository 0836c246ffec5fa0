"""Segments of a state: rows are written once."""

from __future__ import annotations

from pathlib import Path

import pytest

import hessfunc as hf
from tests.algorithms.checkpoint.problem import LIKE, MATRIX, N

pytestmark = pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork")


def test_rows_are_appended_and_not_written_again(tmp_path: Path) -> None:
    written: list[str] = []
    path = tmp_path / "state"

    def look(running: hf.results.Estimate) -> None:
        written.extend(file.name for file in path.glob("*.rows"))

    hf.xnystrace(
        hf.dense(MATRIX),
        LIKE,
        max_matvecs=20,
        block_size=5,
        checkpoint=path,
        seed=1,
        callback=look,
    )
    sizes = [file.stat().st_size for file in path.glob("*.rows")]
    # The first vector and its product, and four rounds of five probes with their products.
    assert sorted(sizes) == [N * 8] * 2 + [5 * N * 8] * 8
