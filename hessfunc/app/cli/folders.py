"""Folders of results: one command at a time, and no file of another program is overwritten."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path


def make_folder(path: Path, /) -> None:
    """Create the folder of the results.

    Raises:
        ValueError: If the folder cannot be created.
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
