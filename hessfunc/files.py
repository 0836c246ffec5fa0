"""Files that are written whole or not at all."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO


def write_whole(path: Path, write: Callable[[BinaryIO], object], /) -> None:
    """Write a file aside, flush it to the disk, and put it in its place at once."""
    part = path.with_name(path.name + ".part")
    try:
        with part.open("wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    except OSError:
        # Another error than that of a full disk or a wrong path leaves nothing to clear away.
        with contextlib.suppress(OSError):
            part.unlink()
        raise
