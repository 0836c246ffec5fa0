"""Devices and processes of a command: under ``torchrun`` all ranks compute, and rank 0 prints."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, TypeVar

# torch is imported late, so that --help does not wait for it.
if TYPE_CHECKING:
    import torch
    from torch.distributed.device_mesh import DeviceMesh

Made = TypeVar("Made")


def several() -> bool:
    """Return whether torchrun has started several processes."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def speaks() -> bool:
    """Return whether this process prints and writes, which only rank 0 does."""
    return int(os.environ.get("RANK", "0")) == 0


@contextmanager
def mesh_of_all(
    device: torch.device | None,
) -> Iterator[tuple[DeviceMesh | None, torch.device | None]]:
    """Yield the mesh of all processes, or None for a single process, and the device of this one."""
    if not several():
        yield None, device
        return
    import torch

    from hessfunc.app.launched import launched, local_device

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


def place(
    device: str | None, dtype: str | None = None
) -> tuple[torch.device | None, torch.dtype | None]:
    """Return the device and the dtype with these names; None stays None.

    Raises:
        ValueError: If the device is unknown or cannot be used.
    """
    import torch

    kind = getattr(torch, dtype) if dtype else None
    if device is None:
        return None, kind
    if not re.fullmatch(r"(cpu|cuda|mps|xpu)(:\d+)?", device):
        raise ValueError(
            f"--device must be one of cpu, cuda, mps, xpu, or one with a number such as cuda:1, "
            f"not {device!r}"
        )
    try:
        return torch.zeros(1, device=device, dtype=kind).device, kind
    except Exception as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"--device {device} cannot be used: {reason}") from error


def refuse_several(command: str, /) -> None:
    """Check that the command runs in a single process.

    Raises:
        ValueError: If torchrun has started several processes.
    """
    if several():
        raise ValueError(
            f"{command} runs in a single process, but torchrun has started "
            f"{os.environ['WORLD_SIZE']}: run it without torchrun"
        )
