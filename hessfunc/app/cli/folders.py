"""Folders of results: one command at a time, and no file of another program is overwritten."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def held(folder: Path, /) -> Iterator[None]:
    """Create a folder of results, and keep other commands out of it by a lock file.

    Raises:
        ValueError: If the folder cannot be created, or if another command is running in it.
    """
    from hessfunc.algorithms.checkpoint import lock as locks

    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"--out {folder} cannot be used: {error.strerror}") from error
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
    """Refuse to overwrite files that no earlier run has written.

    Args:
        folder: Folder of the results.
        names: File names of the results.
        own: File that every earlier run leaves in its folder.

    Raises:
        ValueError: If a file of that name exists, but ``own`` does not.
    """
    taken = [name for name in names if (folder / name).exists()]
    if taken and not (folder / own).exists():
        raise ValueError(
            f"--out {folder} contains a {taken[0]}, but no {own} of an earlier run: choose another "
            "folder, or move that file"
        )
