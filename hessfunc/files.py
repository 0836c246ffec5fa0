"""Atomic writes of files."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO


def write_whole(path: Path, write: Callable[[BinaryIO], object], /) -> None:
    """Write a file atomically: write a temporary file, flush it to disk and rename it."""
    part = path.with_name(path.name + ".part")
    try:
        with part.open("wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    except OSError:
        # Remove the temporary file, if it exists at all; the first error is the one to report.
        with contextlib.suppress(OSError):
            part.unlink()
        raise


def write_bytes(path: Path, data: bytes, /) -> None:
    """Write a file of these bytes atomically."""
    write_whole(path, lambda file: file.write(data))


def write_text(path: Path, text: str, /) -> None:
    """Write a file of this text atomically, in UTF-8 whatever the locale."""
    # Python escapes bytes of a path that the locale cannot decode; they are written unchanged.
    write_bytes(path, text.encode("utf-8", "surrogateescape"))
