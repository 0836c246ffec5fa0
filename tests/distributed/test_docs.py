"""The pages on many processes run, each as one script on two of them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.docs.blocks import python_blocks

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
@pytest.mark.parametrize(("page", "printed"), [("many-ranks.md", 1), ("sharded-parameters.md", 0)])
def test_the_script_runs_on_two_ranks(page: str, printed: int, tmp_path: Path) -> None:
    blocks = python_blocks((ROOT / "docs" / page).read_text())
    assert len(blocks) == 4
    script = tmp_path / "curvature.py"
    script.write_text("\n".join(blocks))
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    done = subprocess.run(
        [*torchrun, "--nproc-per-node", "2", str(script)],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("tensor(") == printed
