"""A command that ``torchrun`` starts in several processes: all compute, one of them speaks."""

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


Made = TypeVar("Made")


def _several() -> bool:
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def speaks() -> bool:
    """Whether this process prints and writes: the first one does."""
    return int(os.environ.get("RANK", "0")) == 0


@contextmanager
def mesh_of_all(
    device: torch.device | None,
) -> Iterator[tuple[DeviceMesh | None, torch.device | None]]:
    """The mesh of the processes, and where this one computes; no mesh where it is alone."""
    if not _several():
        yield None, device
        return
    import torch

    from hessfunc.app.cli.ranks import launched, local_device

    own = local_device(device or torch.device("cpu"))
    with launched(own) as mesh:
        yield mesh, own


def on_all(mesh: DeviceMesh | None, act: Callable[[], Made]) -> Made:
    """What ``act`` returns; its error in one process is an error in all."""
    if mesh is None:
        return act()
    import torch

    from hessfunc.ranks import Ranks

    return Ranks.of(mesh).all_do(act, torch.device(mesh.device_type))


def refuse_several(command: str, /) -> None:
    """Raise where there are other processes.

    Raises:
        ValueError: it is so.
    """
    if _several():
        raise ValueError(
            f"{command} runs in one process, and torchrun has started "
            f"{os.environ['WORLD_SIZE']}: run it without torchrun"
        )
