"""One run at a time holds a directory."""

from __future__ import annotations

import json
import os
import socket
from pathlib import Path
from typing import Any

import pytest

import hessfunc as hf
from tests.algorithms.checkpoint.forks import forked
from tests.algorithms.checkpoint.problem import MATRIX, run_lanczos, same

pytestmark = pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork")


@pytest.mark.usefixtures("one_thread")
def test_a_second_process_is_refused_with_the_name_of_the_first(tmp_path: Path) -> None:
    ready, go = os.pipe(), os.pipe()

    def waits(block: Any) -> Any:
        os.write(ready[1], b"x")
        os.read(go[0], 1)
        return hf.dense(MATRIX)(block)

    child = forked(lambda: run_lanczos(tmp_path, matvec=waits, max_matvecs=4))
    os.read(ready[0], 1)
    with pytest.raises(ValueError, match=f"process {child} on host {socket.gethostname()} is run"):
        run_lanczos(tmp_path)
    os.write(go[1], b"x" * 100)
    assert os.waitpid(child, 0)[1] == 0
    assert same(run_lanczos(tmp_path), run_lanczos(tmp_path / "fresh"))


def test_a_second_run_of_this_process_is_refused(tmp_path: Path) -> None:
    def look(running: hf.results.Eigenpairs) -> None:
        with pytest.raises(ValueError, match=f"process {os.getpid()} on host"):
            run_lanczos(tmp_path)

    first = run_lanczos(tmp_path, callback=look)
    assert same(run_lanczos(tmp_path), first)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"host": "elsewhere"}, "process 7 on host elsewhere .* delete .*hessfunc.lock"),
        ({"pid": os.getpid(), "started": "another time"}, None),
        ({"pid": 2**22 + 1}, None),
    ],
)
def test_a_lock_that_was_left(changed: dict[str, Any], message: str | None, tmp_path: Path) -> None:
    owner = {"host": socket.gethostname(), "pid": 7, "started": "1", "run": "00000000"}
    (tmp_path / "hessfunc.lock").write_text(json.dumps(owner | changed))
    # What the interrupted run wrote before its first manifest.
    (tmp_path / "00000000-abc.rows").write_text("rows")
    if message is None:
        run_lanczos(tmp_path)
        assert not (tmp_path / "hessfunc.lock").exists()
        assert not (tmp_path / "00000000-abc.rows").exists()
    else:
        with pytest.raises(ValueError, match=message):
            run_lanczos(tmp_path)
