"""The pages on many processes run, each as one script on two of them."""

from __future__ import annotations

import contextlib
import io
import os
import socket
from pathlib import Path

import pytest
import torch.distributed as dist

from tests.distributed.ranks import Ranks
from tests.docs.blocks import python_blocks

DOCS = Path(__file__).parents[2] / "docs"


def as_script(script: str, port: int, folder: Path) -> str:
    """What a script prints in a process with the environment that torchrun gives it."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    dist.destroy_process_group()
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.environ |= address | {"RANK": str(rank), "WORLD_SIZE": str(ranks), "LOCAL_RANK": str(rank)}
    os.chdir(folder)
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        exec(compile(script, "curvature.py", "exec"), {"__name__": "__main__"})
    store = f"file://{folder}/store"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=ranks)
    return printed.getvalue()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("page", "count", "printed"), [("many-ranks.md", 4, 1), ("sharded-parameters.md", 5, 0)]
)
def test_the_script_runs_on_two_ranks(
    page: str, count: int, printed: int, two: Ranks, tmp_path: Path
) -> None:
    blocks = python_blocks((DOCS / page).read_text())
    assert len(blocks) == count
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    outputs = two.run(as_script, "\n".join(blocks), port, tmp_path)
    assert "".join(outputs).count("tensor(") == printed
