"""A rank that is killed ends the run, clearly and soon, and nothing is lost."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

import hessfunc as hf
from tests.distributed import problems
from tests.distributed.killed import ENDS, NODES, TIMEOUT, uninterrupted_on_ranks
from tests.distributed.ranks import Ranks

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]


def start(folder: Path, ranks: int, victim: int, fatal: int) -> list[subprocess.Popen[str]]:
    # A file that two runs share would hold the addresses of the dead.
    port = str(20000 + (os.getpid() * 7 + time.time_ns() // 1000) % 20000)
    shared = os.environ | {
        "OMP_NUM_THREADS": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
        "WORLD_SIZE": str(ranks),
    }
    words = [sys.executable, "-m", "tests.distributed.killed", str(folder), str(victim), str(fatal)]
    return [
        subprocess.Popen(
            words, cwd=ROOT, env=shared | {"RANK": str(r)}, stderr=subprocess.PIPE, text=True
        )
        for r in range(ranks)
    ]


def ended(processes: list[subprocess.Popen[str]]) -> list[tuple[int, str]]:
    return [(p.wait(), errors) for p in processes for errors in [p.communicate(timeout=120)[1]]]


def found(folder: Path) -> dict[str, Any]:
    told: dict[str, Any] = json.loads((folder / "found.json").read_text())
    return told


def uninterrupted() -> hf.results.Eigenpairs:
    loss, params = problems.model_and_loss()
    matvec = hf.over_batches(hf.hvp(loss))(params, problems.batches())
    return hf.lanczos(matvec, params, k=4, basis_size=12, rtol=1e-10, seed=0)


@pytest.mark.parametrize(("victim", "ranks"), [(0, 3), (1, 2)])
def test_kill_9_of_one_rank_ends_the_others_and_fewer_go_on(
    victim: int, ranks: int, two: Ranks, tmp_path: Path
) -> None:
    processes = start(tmp_path, ranks, victim, fatal=4)
    processes[victim].wait(120)
    killed = time.monotonic()
    outcomes = ended(processes)
    assert time.monotonic() - killed < 3 * TIMEOUT
    assert outcomes[victim][0] == -9
    for rank, (status, errors) in enumerate(outcomes):
        if rank != victim:
            assert status > 0
            assert f"rank {rank} has lost contact with the other ranks" in errors
    assert not (tmp_path / "found.json").exists()
    two.run(uninterrupted_on_ranks, tmp_path)

    wanted, again = uninterrupted(), found(tmp_path)
    torch.testing.assert_close(
        torch.tensor(again["values"], dtype=torch.float64), wanted.values, rtol=1e-9, atol=1e-12
    )
    # Ranks add up in another order, which may move the last round by one.
    assert again["matvecs"] == pytest.approx(wanted.matvecs, rel=0.1)


def test_torchrun_starts_a_killed_run_again(tmp_path: Path) -> None:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    words = ["--nproc-per-node", "2", "--max-restarts", "1", "-m", "tests.distributed.killed"]
    done = subprocess.run(
        [*torchrun, *words, str(tmp_path), "1", "4"],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr
    wanted, again = uninterrupted(), found(tmp_path)
    torch.testing.assert_close(
        torch.tensor(again["values"], dtype=torch.float64), wanted.values, rtol=1e-9, atol=1e-12
    )
    # The second start did not begin anew.
    assert 0 < again["rounds"] < rounds_of_all()


def test_an_elastic_run_resumes_on_the_node_that_is_left(tmp_path: Path) -> None:
    """Two nodes of one rank, of which one is killed with its agent."""
    port = 20000 + (os.getpid() * 7 + time.time_ns() // 1000) % 20000
    quick = "last_call_timeout=1,keep_alive_interval=1,keep_alive_max_attempt=2"

    def node(is_first: bool) -> subprocess.Popen[str]:
        told = {NODES: "2"} if is_first else {NODES: "2", ENDS: "1"}
        rendezvous = [
            *("--rdzv-backend", "c10d", "--rdzv-endpoint", f"127.0.0.1:{port}"),
            *("--rdzv-conf", f"is_host={int(is_first)},{quick}", "--monitor-interval", "0.1"),
        ]
        shape = ["--nnodes", "1:2", "--nproc-per-node", "1", "--max-restarts", "2"]
        words = [*shape, *rendezvous, "-m", "tests.distributed.killed", str(tmp_path), "-1", "4"]
        return subprocess.Popen(
            [sys.executable, "-m", "torch.distributed.run", *words],
            cwd=ROOT,
            env=os.environ | {"OMP_NUM_THREADS": "1"} | told,
            stderr=subprocess.PIPE,
            text=True,
        )

    nodes = [node(True), node(False)]
    (left, errors), (ended_by_kill, _) = ended(nodes)
    assert left == 0, errors
    assert ended_by_kill == -9
    wanted, again = uninterrupted(), found(tmp_path)
    assert again["ranks"] == 1
    torch.testing.assert_close(
        torch.tensor(again["values"], dtype=torch.float64), wanted.values, rtol=1e-9, atol=1e-12
    )
    assert 0 < again["rounds"] < rounds_of_all()


def rounds_of_all() -> int:
    loss, params = problems.model_and_loss()
    matvec = hf.over_batches(hf.hvp(loss))(params, problems.batches())
    rounds = []
    hf.lanczos(matvec, params, k=4, basis_size=12, rtol=1e-10, seed=0, callback=rounds.append)
    return len(rounds)
