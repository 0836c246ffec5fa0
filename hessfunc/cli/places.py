"""Where and in which dtype to compute, and where results go."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING

# torch takes a second to import, and --help need not wait for it.
if TYPE_CHECKING:
    import torch

__all__ = ["DType", "held", "make_folder", "place", "refuse_other_files"]


class DType(StrEnum):
    """A dtype of parameters and inputs."""

    float32 = "float32"
    float64 = "float64"


def place(
    device: str | None, dtype: DType | None = None
) -> tuple[torch.device | None, torch.dtype | None]:
    """The device and the dtype of these names.

    Raises:
        ValueError: the device cannot be used.
    """
    import torch

    kind = getattr(torch, dtype) if dtype else None
    if device is None:
        return None, kind
    try:
        return torch.zeros(1, device=device, dtype=kind).device, kind
    except Exception as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"--device {device} cannot be used: {reason}") from error


def make_folder(path: Path, /) -> None:
    """Make the folder of the results.

    Raises:
        ValueError: it cannot be made.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"--out {path} cannot be used: {error.strerror}") from error


@contextmanager
def held(folder: Path, /) -> Iterator[None]:
    """Keep other commands out of a folder of results, which must exist, by a lock file in it.

    Raises:
        ValueError: Another command is running in the folder.
    """
    from hessfunc.algorithms.checkpoint import lock as locks

    try:
        owner = locks.acquire(folder, "", option="--out")
    except ImportError:
        # Windows has no locks of this kind.
        yield
        return
    try:
        yield
    finally:
        locks.release(folder, owner)


def refuse_other_files(folder: Path, names: Iterable[str], own: str, /) -> None:
    """Raise where results would overwrite files that no earlier run has written.

    Args:
        folder: The folder of the results.
        names: The names of the results.
        own: The file without which the folder belongs to no earlier run.

    Raises:
        ValueError: One of the names is taken.
    """
    there = [name for name in names if (folder / name).exists()]
    if there and not (folder / own).exists():
        raise ValueError(
            f"--out {folder} has a {there[0]}, and no {own} of an earlier run: choose another "
            "folder, or move that file"
        )
