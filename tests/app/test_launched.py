"""The process group of processes that torchrun has started."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from hessfunc.app.launched import local_device

ROOT = Path(__file__).parents[2]
CODE = """
import json, os, torch, torch.distributed as dist
from hessfunc.app.launched import launched
with launched(torch.device("cpu"), timeout=30) as mesh:
    total = torch.tensor([dist.get_rank() + 1.0])
    dist.all_reduce(total, group=mesh.get_group("data"))
    found = [mesh.mesh_dim_names, mesh.size(), float(total), dist.get_backend()]
if dist.is_initialized() or found[2] != 3:
    raise SystemExit("the group is " + str(found))
# One write, so that the lines of the processes do not mix.
os.write(1, (json.dumps(found) + "\\n").encode())
"""


def test_the_mesh_has_all_processes_and_ends_with_the_block(tmp_path: Path) -> None:
    script = tmp_path / "sums.py"
    script.write_text(CODE)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    done = subprocess.run(
        [*torchrun, "--nproc-per-node", "2", str(script)],
        cwd=ROOT,
        env={"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PATH": ""},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert lines == [[["data"], 2, 3.0, "gloo"]] * 2


def test_a_device_that_is_no_gpu_is_that_of_every_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert local_device(torch.device("cpu")) == torch.device("cpu")
    monkeypatch.delenv("LOCAL_RANK")
    assert local_device(torch.device("cuda")) == torch.device("cuda")
