"""A run on several ranks, one of which is killed: ``python -m tests.distributed.killed``."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

import hessfunc as hf
from hessfunc.app.launched import launched
from tests.distributed import problems

TIMEOUT = 20


# Environment of a node of torchrun: how many nodes must be there first, and whether it ends then.
NODES, ENDS = "NODES_OF_TEST", "NODE_OF_TEST_ENDS"


def main(folder: Path, victim: int, fatal_round: int) -> None:
    """Find eigenvalues with a checkpoint in the folder; one rank ends itself after a round."""
    torch.set_num_threads(1)
    if _is_first() and int(os.environ["WORLD_SIZE"]) < int(os.environ.get(NODES, "1")):
        # The agent ends this process when the other node joins.
        time.sleep(60)
    with launched(torch.device("cpu"), timeout=TIMEOUT) as mesh:
        _run(folder, victim, fatal_round, mesh)


def _is_first() -> bool:
    return os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0"


def uninterrupted_on_ranks(folder: Path) -> None:
    """Do the same in processes that have a group, and kill none."""
    _run(folder, -1, 0, problems.mesh(dist.get_world_size()))


def _run(folder: Path, victim: int, fatal_round: int, mesh: DeviceMesh) -> None:
    rank = dist.get_rank()
    loss, params = problems.model_and_loss()
    matvec = hf.over_batches(hf.hvp(loss), mesh=mesh)(params, problems.batches())
    rounds = 0

    def count(_: Any) -> None:
        nonlocal rounds
        rounds += 1
        if rounds == fatal_round and _is_first():
            if ENDS in os.environ:
                os.kill(os.getppid(), signal.SIGKILL)
            if rank == victim or ENDS in os.environ:
                os.kill(os.getpid(), signal.SIGKILL)

    found = hf.lanczos(
        matvec,
        params,
        k=4,
        basis_size=12,
        rtol=1e-10,
        seed=0,
        space=hf.sharded(params, mesh),
        checkpoint=folder / "checkpoint",
        callback=count,
    )
    if rank == 0:
        told = {
            "values": found.values.tolist(),
            "matvecs": found.matvecs,
            "rounds": rounds,
            "ranks": dist.get_world_size(),
        }
        (folder / "found.json").write_text(json.dumps(told))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
