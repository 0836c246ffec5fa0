"""The one file that says which segments make up a state, and whose state it is."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from hessfunc import files

__all__ = ["SEGMENT", "damaged", "digest_of", "read", "remove_all_but", "replace", "stamp"]

SEGMENT = ".rows"
_MANIFEST = "manifest.json"
_FORMAT = 3


def read(directory: Path, /) -> dict[str, Any] | None:
    """What the manifest of a directory says; None where there is none.

    Raises:
        ValueError: the directory holds something else, or the manifest is damaged.
    """
    if not directory.exists():
        return None
    if not directory.is_dir():
        raise ValueError(f"checkpoint {directory}: a file is there, and a directory is needed")
    if strangers := [file.name for file in directory.iterdir() if not _is_ours(file)]:
        raise ValueError(
            f"checkpoint {directory}: the directory holds other files ({strangers[0]}): choose "
            "one of its own"
        )
    path = directory / _MANIFEST
    if not path.exists():
        return None
    digest, _, text = path.read_bytes().partition(b"\n")
    if digest_of(text).encode() != digest:
        raise damaged(directory, "the manifest")
    manifest: dict[str, Any] = json.loads(text)
    if manifest["format"] != _FORMAT:
        raise ValueError(
            f"checkpoint {directory}: written in format {manifest['format']}, and this version "
            f"reads format {_FORMAT}: finish the run with the version that began it"
        )
    return manifest


def stamp(directory: Path, /) -> str:
    """What tells the manifest that is there now from any other; empty where there is none."""
    try:
        with (directory / _MANIFEST).open("rb") as file:
            return file.readline().strip().decode(errors="replace")
    except (FileNotFoundError, NotADirectoryError):
        return ""


def replace(directory: Path, body: dict[str, Any], /) -> str:
    """Put another manifest in the place of the one that is there: its stamp."""
    text = json.dumps({"format": _FORMAT} | body).encode()
    digest = digest_of(text)
    _flush(directory)
    files.write_whole(
        directory / _MANIFEST, lambda file: file.write(digest.encode() + b"\n" + text)
    )
    _flush(directory)
    return digest


def remove_all_but(directory: Path, segments: set[str], /) -> None:
    """Remove the files of states before this one."""
    for file in directory.iterdir():
        if _is_ours(file) and file.name not in (segments | {_MANIFEST}):
            file.unlink(missing_ok=True)


def damaged(directory: Path, what: str, /) -> ValueError:
    """The error of a state of which a part is not what was written."""
    return ValueError(
        f"checkpoint {directory}: {what} is damaged, nothing was changed: restore it from a copy, "
        "or choose another directory to begin anew"
    )


def digest_of(data: bytes | memoryview, /) -> str:
    """A number of bytes that others would not have."""
    return hashlib.blake2b(data, digest_size=16).hexdigest()


def _is_ours(file: Path) -> bool:
    name = file.name.removesuffix(".part")
    return name == _MANIFEST or name.endswith(SEGMENT)


def _flush(directory: Path) -> None:
    """Names of new files are on the disk only when the directory is."""
    handle = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
