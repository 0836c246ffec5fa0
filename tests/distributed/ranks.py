"""Processes of torch.distributed that wait for functions to run, so that each test starts none."""

from __future__ import annotations

import faulthandler
import os
import pickle
import signal
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


class Forks:
    """A process that has imported what ranks need, and forks them: an import takes seconds."""

    def __init__(self) -> None:
        self.folder = tempfile.TemporaryDirectory()
        address = str(Path(self.folder.name, "socket"))
        with Listener(address) as listener:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "tests.distributed.ranks", address],
                env=os.environ | {"OMP_NUM_THREADS": "1"},
                cwd=Path(__file__).parents[2],
                start_new_session=True,
            )
            self.connection = listener.accept()

    def ranks(self, address: str, size: int) -> None:
        """Have so many ranks connect to this address."""
        self.connection.send((address, size))

    def close(self) -> None:
        # Ranks that wait for one that has died are ended with the others.
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        self.folder.cleanup()


class Ranks:
    """So many gloo processes; `run` calls a function of a module on each of them."""

    def __init__(self, size: int, forks: Forks) -> None:
        self.folder = tempfile.TemporaryDirectory()
        address = str(Path(self.folder.name, "socket"))
        with Listener(address) as listener:
            forks.ranks(address, size)
            unordered = [listener.accept() for _ in range(size)]
        by_rank = {connection.recv(): connection for connection in unordered}
        self.connections: list[Connection] = [by_rank[rank] for rank in range(size)]

    def outcomes(self, function: Callable[..., Any], *args: Any) -> list[Outcome]:
        """What the function came to on each rank."""
        for connection in self.connections:
            connection.send_bytes(pickle.dumps((function, args)))
        return [self._outcome(rank) for rank in range(len(self.connections))]

    def _outcome(self, rank: int) -> Outcome:
        try:
            return Outcome(*pickle.loads(self.connections[rank].recv_bytes()))
        except EOFError:
            errors = _errors(Path(self.folder.name, "socket"), rank).read_text()
            raise RuntimeError(f"rank {rank} has ended: {errors}") from None

    def run(self, function: Callable[..., Any], *args: Any) -> list[Any]:
        """What the function returned on each rank."""
        found = self.outcomes(function, *args)
        for rank, outcome in enumerate(found):
            assert outcome.error is None, f"rank {rank}: {outcome.trace}"
        return [outcome.value for outcome in found]

    def refuse(self, message: str, function: Callable[..., Any], *args: Any) -> None:
        """Assert that the function raises an error that begins so, on each rank."""
        for outcome in self.outcomes(function, *args):
            assert outcome.error is not None
            assert outcome.error.startswith(message)

    def close(self) -> None:
        for connection in self.connections:
            connection.close()
        self.folder.cleanup()


def _errors(address: str | Path, rank: int) -> Path:
    """Where a rank writes its last words, such as those of a crash in C++."""
    return Path(f"{address}.{rank}.txt")


def _fork(address: str) -> None:
    import pytest  # noqa: F401
    import torch
    import torch._dynamo
    import torch.distributed.fsdp
    import torch.distributed.tensor.parallel

    import tests.distributed.problems  # noqa: F401

    torch.set_num_threads(1)
    # The ends of ranks are waited for by nobody.
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    with Client(address) as connection:
        while True:
            try:
                address, size = connection.recv()
            except EOFError:
                return
            for rank in range(size):
                if os.fork() == 0:
                    _serve(address, rank, size)
                    os._exit(0)


def _serve(address: str, rank: int, size: int) -> None:
    import torch
    import torch.distributed as dist

    errors = _errors(address, rank).open("w")
    os.dup2(errors.fileno(), 2)
    faulthandler.enable(errors)
    warnings.simplefilter("error")
    # As in tests/conftest.py.
    warnings.filterwarnings("ignore", "`torch.jit.script")
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
    _fork(sys.argv[1])
