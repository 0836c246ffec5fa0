"""Processes of torch.distributed that wait for functions to run, so that each test starts none."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
import tempfile
import traceback
import warnings
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Client, Connection, Listener
from pathlib import Path
from typing import Any, NamedTuple

SECONDS = 60


class Outcome(NamedTuple):
    """What a rank returned, or its error as ``KeyError: 'x'``, and where that came up."""

    value: Any
    error: str | None
    trace: str


class Ranks:
    """So many gloo processes; `run` calls a function of a module on each of them."""

    def __init__(self, size: int) -> None:
        self.folder = tempfile.TemporaryDirectory()
        address = str(Path(self.folder.name, "socket"))
        listener = Listener(address)
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        self.processes = [
            subprocess.Popen(
                [sys.executable, "-m", "tests.distributed.ranks", address, str(r), str(size)],
                env=environment,
                cwd=Path(__file__).parents[2],
            )
            for r in range(size)
        ]
        with listener:
            unordered = [listener.accept() for _ in range(size)]
        by_rank = {connection.recv(): connection for connection in unordered}
        self.connections: list[Connection] = [by_rank[rank] for rank in range(size)]

    def outcomes(self, function: Callable[..., Any], *args: Any) -> list[Outcome]:
        """What the function came to on each rank."""
        for connection in self.connections:
            connection.send_bytes(pickle.dumps((function, args)))
        return [Outcome(*pickle.loads(c.recv_bytes())) for c in self.connections]

    def run(self, function: Callable[..., Any], *args: Any) -> list[Any]:
        """What the function returned on each rank."""
        found = self.outcomes(function, *args)
        for rank, outcome in enumerate(found):
            assert outcome.error is None, f"rank {rank}: {outcome.trace}"
        return [outcome.value for outcome in found]

    def close(self) -> None:
        for connection in self.connections:
            connection.close()
        for process in self.processes:
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                # Of those that wait for one that has died.
                process.kill()
                process.wait()
        self.folder.cleanup()


def _serve(address: str, rank: int, size: int) -> None:
    import torch
    import torch.distributed as dist

    warnings.simplefilter("error")
    # As in tests/conftest.py.
    warnings.filterwarnings("ignore", "`torch.jit.script", DeprecationWarning)
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{address}.store",
        rank=rank,
        world_size=size,
        timeout=timedelta(seconds=SECONDS),
    )
    connection = Client(address)
    connection.send(rank)
    while True:
        try:
            function, args = pickle.loads(connection.recv_bytes())
        except (EOFError, ConnectionResetError):
            break
        try:
            torch.manual_seed(0)
            found = (function(*args), None, "")
        except Exception as failure:
            found = (None, f"{type(failure).__name__}: {failure}", traceback.format_exc())
        # Tensors would else be shared by way of files.
        connection.send_bytes(pickle.dumps(found))
    dist.destroy_process_group()


if __name__ == "__main__":
    _serve(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
