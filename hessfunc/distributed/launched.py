"""The processes that ``torchrun`` has started."""

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

__all__ = ["launched", "local_device"]

# Seconds.
_TO_END = 0.5


@contextmanager
def launched(device: torch.device, /, *, timeout: float = 600.0) -> Iterator[DeviceMesh]:
    """The mesh of all processes, on one axis "data", as long as the context lasts.

    Args:
        device: on which this process computes: gloo for the CPU, NCCL for CUDA.
        timeout: the seconds after which a rank that does not come is an error on the others.
    """
    limit = timedelta(seconds=timeout)
    store, rank, size = next(rendezvous("env://", timeout=limit))
    # torchrun starts killed processes again beside the same store, where torch would find the
    # addresses of the dead.
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
        # gloo's threads end a moment later, and an interpreter that ends before them aborts.
        time.sleep(_TO_END)


def local_device(device: torch.device, /) -> torch.device:
    """That device, or of several GPUs of the machine the one of this process."""
    if device.type != "cuda" or "LOCAL_RANK" not in os.environ:
        return device
    found = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    torch.cuda.set_device(found)
    return found
