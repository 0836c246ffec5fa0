"""Runs that are killed at random moments lose nothing."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from bench.kills import RUNS, Fatal, attempt, main, refuse_other, uninterrupted

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork"),
]


@pytest.mark.parametrize("ranks", [1, 3])
def test_killed_runs_resume(ranks: int) -> None:
    kills = int(os.environ.get("HESSFUNC_KILLS", "3"))
    assert main(kills=kills, ranks=ranks, seed=ranks).total() >= kills


def test_a_lost_checkpoint_is_noticed(tmp_path: Path) -> None:
    expected = uninterrupted(RUNS["lanczos"])
    assert attempt(tmp_path, RUNS["lanczos"], 1, Fatal(0, 2, 0.0))
    assert (tmp_path / "state").is_dir()
    assert not (tmp_path / "found.pt").exists()
    changed: dict[str, Any] = expected["numbers"] | {"matvecs": 1}
    with pytest.raises(RuntimeError, match="matvecs is"):
        refuse_other(changed, expected["numbers"], exact=True)
