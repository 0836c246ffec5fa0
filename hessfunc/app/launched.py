"""Processes that ``torchrun`` has started: their process group and their devices."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.rendezvous import rendezvous

# Seconds that gloo's threads get to finish after the process group is destroyed.
_TO_END = 0.5


@contextmanager
def launched(device: torch.device, /, *, timeout: float = 600.0) -> Iterator[DeviceMesh]:
    """Initialise the process group, and yield the mesh of all processes with one axis "data".

    Args:
        device: Device of this process; the backend is gloo on the CPU and NCCL on CUDA.
        timeout: Seconds after which a missing rank is an error on the other ranks.
    """
    limit = timedelta(seconds=timeout)
    store, rank, size = next(rendezvous("env://", timeout=limit))
    # After a crash, torchrun restarts the processes with the same store, which still contains the
    # addresses of the dead processes. A prefix for each attempt hides them.
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    dist.init_process_group(
        "nccl" if device.type == "cuda" else "gloo",
        store=PrefixStore(f"attempt {attempt}", store),
        rank=rank,
        world_size=size,
        timeout=limit,
    )
    try:
        yield init_device_mesh(device.type, (dist.get_world_size(),), mesh_dim_names=("data",))
    finally:
        dist.destroy_process_group()
        # gloo's threads end slightly later, and an interpreter that exits before them aborts.
        time.sleep(_TO_END)


def local_device(device: torch.device, /) -> torch.device:
    """Return the device, or the GPU of this process if the device is CUDA on several ranks."""
    if device.type != "cuda" or "LOCAL_RANK" not in os.environ:
        return device
    own = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    torch.cuda.set_device(own)
    return own
