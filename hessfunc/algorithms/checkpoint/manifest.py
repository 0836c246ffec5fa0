"""Manifest of a checkpoint: the file that lists the segments of a state and identifies the run."""

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
    """Return the content of the manifest of a directory, or None if there is no manifest.

    Raises:
        ValueError: If the path is a file, if the manifest is damaged or of another program, or if
            it has the format of another version.
    """
    if not directory.exists():
        return None
    if not directory.is_dir():
        raise ValueError(
            f"checkpoint {directory}: a file is there, not a directory: pass the path of a "
            f"directory, such as checkpoint={str(directory.with_suffix('.run'))!r}"
        )
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
            f"checkpoint {directory}: the state has format {manifest['format']}, and this version "
            f"reads format {_FORMAT}: resume the run with the version that began it"
        )
    return manifest


def refuse_other_files(directory: Path, run: str, /) -> None:
    """Raise an error if a directory without a manifest contains files of other origin.

    Args:
        directory: Directory, which need not exist.
        run: Prefix of the files that this run writes.

    Raises:
        ValueError: If the directory contains files that this run has not written.
    """
    ours = {LOCK, f"{_MANIFEST}.part"}
    files = directory.iterdir() if directory.exists() else ()
    if others := sorted(f.name for f in files if f.name not in ours and not _is_of(f, run)):
        raise _other_files(directory, others[0])


def stamp(directory: Path, /) -> str:
    """Return the digest of the current manifest, or an empty string if there is none."""
    try:
        with (directory / _MANIFEST).open("rb") as file:
            return file.readline().strip().decode(errors="replace")
    except (FileNotFoundError, NotADirectoryError):
        return ""


def replace(directory: Path, body: dict[str, Any], /) -> str:
    """Replace the manifest atomically, and return the stamp of the new one."""
    text = json.dumps({"format": _FORMAT} | body).encode()
    digest = digest_of(text)
    _flush(directory)
    files.write_whole(
        directory / _MANIFEST, lambda file: file.write(digest.encode() + b"\n" + text)
    )
    _flush(directory)
    return digest


def remove_all_but(directory: Path, run: str, segments: set[str], /) -> None:
    """Remove the segments of earlier states, all other files that this run has written."""
    for file in directory.iterdir():
        if _is_of(file, run) and file.name not in segments:
            file.unlink(missing_ok=True)


def damaged(directory: Path, what: str, /) -> ValueError:
    """Return the error of a state with a part that differs from what was written."""
    return ValueError(
        f"checkpoint {directory}: {what} is damaged, nothing was changed: restore it from a copy, "
        "or choose another directory to start a new run"
    )


def _other_files(directory: Path, name: str) -> ValueError:
    """Return the error of a directory that contains a file of other origin."""
    return ValueError(
        f"checkpoint {directory}: the directory holds other files ({name}): choose an empty "
        f"directory, such as checkpoint={str(directory / 'run')!r}"
    )


def _is_of(file: Path, run: str) -> bool:
    """Return whether the run with this prefix wrote the file."""
    return bool(run) and file.name.startswith(f"{run}-")


def _flush(directory: Path) -> None:
    """Write the directory to disk, without which the names of new files may be lost."""
    handle = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
