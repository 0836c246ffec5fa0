"""A command that ``torchrun`` starts in several processes: all compute, one of them speaks."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    import torch
    from torch.distributed.device_mesh import DeviceMesh

__all__ = ["mesh_of_all", "on_all", "refuse_several", "speaks"]

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

    from hessfunc.distributed.launched import launched, local_device

    own = local_device(device or torch.device("cpu"))
    with launched(own) as mesh:
        yield mesh, own


def on_all(mesh: DeviceMesh | None, act: Callable[[], Made]) -> Made:
    """What ``act`` returns; its error in one process is an error in all."""
    if mesh is None:
        return act()
    import torch

    from hessfunc.distributed.ranks import Ranks

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
