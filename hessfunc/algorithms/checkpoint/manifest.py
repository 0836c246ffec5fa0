"""The one file that says which segments make up a state, and whose state it is."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from hessfunc import files
from hessfunc.algorithms.checkpoint.lock import LOCK
from hessfunc.fingerprints import digest_of

SEGMENT = ".rows"
_MANIFEST = "manifest.json"
_FORMAT = 4


def read(directory: Path, /) -> dict[str, Any] | None:
    """What the manifest of a directory says; None where there is none.

    Raises:
        ValueError: The path is a file, or the manifest is damaged or of another program.
    """
    if not directory.exists():
        return None
    if not directory.is_dir():
        raise ValueError(f"checkpoint {directory}: a file is there, and a directory is needed")
    path = directory / _MANIFEST
    if not path.exists():
        return None
    digest, _, text = path.read_bytes().partition(b"\n")
    if len(digest) != len(digest_of(b"")):
        raise _other_files(directory, _MANIFEST)
    if digest_of(text).encode() != digest:
        raise damaged(directory, "the manifest")
    manifest: dict[str, Any] = json.loads(text)
    if manifest["format"] != _FORMAT:
        raise ValueError(
            f"checkpoint {directory}: written in format {manifest['format']}, and this version "
            f"reads format {_FORMAT}: finish the run with the version that began it"
        )
    return manifest


def refuse_other_files(directory: Path, run: str, /) -> None:
    """Raise where a directory without a manifest has files that this run has not written.

    Raises:
        ValueError: It has.
    """
    ours = {LOCK, f"{_MANIFEST}.part"}
    files = directory.iterdir() if directory.exists() else ()
    if others := sorted(f.name for f in files if f.name not in ours and not _is_of(f, run)):
        raise _other_files(directory, others[0])


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


def remove_all_but(directory: Path, run: str, segments: set[str], /) -> None:
    """Remove the other files that this run has written: segments of earlier states."""
    for file in directory.iterdir():
        if _is_of(file, run) and file.name not in segments:
            file.unlink(missing_ok=True)


def damaged(directory: Path, what: str, /) -> ValueError:
    """The error of a state of which a part is not what was written."""
    return ValueError(
        f"checkpoint {directory}: {what} is damaged, nothing was changed: restore it from a copy, "
        "or choose another directory to begin anew"
    )


def _other_files(directory: Path, name: str) -> ValueError:
    return ValueError(
        f"checkpoint {directory}: the directory holds other files ({name}): choose an empty one, "
        f"such as checkpoint={str(directory / 'run')!r}"
    )


def _is_of(file: Path, run: str) -> bool:
    """Whether a run of this prefix wrote the file."""
    return bool(run) and file.name.startswith(f"{run}-")


def _flush(directory: Path) -> None:
    """Names of new files are on the disk only when the directory is."""
    handle = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
