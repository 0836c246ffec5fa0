"""Commands that ``torchrun`` starts in several processes: all compute, rank 0 prints."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, TypeVar

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.rendezvous import rendezvous

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


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


Made = TypeVar("Made")


def _several() -> bool:
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def speaks() -> bool:
    """Return whether this process prints and writes, which only rank 0 does."""
    return int(os.environ.get("RANK", "0")) == 0


@contextmanager
def mesh_of_all(
    device: torch.device | None,
) -> Iterator[tuple[DeviceMesh | None, torch.device | None]]:
    """Yield the mesh of all processes, or None for a single process, and the device of this one."""
    if not _several():
        yield None, device
        return
    import torch

    from hessfunc.app.cli.ranks import launched, local_device

    own = local_device(device or torch.device("cpu"))
    with launched(own) as mesh:
        yield mesh, own


def on_all(mesh: DeviceMesh | None, act: Callable[[], Made]) -> Made:
    """Return the result of ``act``; an error on one rank is raised on every rank."""
    if mesh is None:
        return act()
    import torch

    from hessfunc.ranks import Ranks

    return Ranks.of(mesh).all_do(act, torch.device(mesh.device_type))


def refuse_several(command: str, /) -> None:
    """Check that the command runs in a single process.

    Raises:
        ValueError: If torchrun has started several processes.
    """
    if _several():
        raise ValueError(
            f"{command} runs in a single process, but torchrun has started "
            f"{os.environ['WORLD_SIZE']}: run it without torchrun"
        )
