"""The lock of a directory of checkpoints or results, which one run at a time holds."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import threading
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

LOCK = "hessfunc.lock"

# Locks of the operating system exclude other processes, but not other threads of this one.
_threads = threading.Lock()


@dataclass(frozen=True)
class Owner:
    """The process that holds a directory.

    Attributes:
        host: Name of its host.
        pid: Its number on that host.
        started: Start time in the words of the operating system, as numbers are used again.
        run: Prefix of the files that the run writes.
    """

    host: str
    pid: int
    started: str
    run: str

    @classmethod
    def here(cls, run: str, /) -> Owner:
        """This process."""
        return cls(socket.gethostname(), os.getpid(), _start_time(os.getpid()) or "", run)

    @property
    def ended(self) -> bool:
        """Whether the process is known to have ended; False for a process of another host."""
        return self.host == socket.gethostname() and _start_time(self.pid) != self.started


def acquire(directory: Path, run: str, /, *, option: str = "checkpoint") -> Owner:
    """Take the directory for this process, from a process that has ended if need be.

    Args:
        directory: Directory, which must exist.
        run: Prefix of the files that the run writes.
        option: Option that names the directory, for messages.

    Raises:
        ValueError: Another run holds the directory.
    """
    mine = Owner.here(run)
    with _exclusive(directory / LOCK) as file:
        _refuse(directory, _owner(directory, os.read(file, 4096), option), option)
        os.ftruncate(file, 0)
        os.pwrite(file, json.dumps(asdict(mine)).encode(), 0)
        os.fsync(file)
    return mine


def release(directory: Path, mine: Owner, /) -> None:
    """Remove the lock of this run, if it is still there."""
    if owner_of(directory) == mine:
        with _exclusive(directory / LOCK) as file:
            if _owner(directory, os.read(file, 4096)) == mine:
                (directory / LOCK).unlink()


def refuse_if_held(directory: Path, /) -> None:
    """Raise where another run holds the directory.

    Raises:
        ValueError: It does, or may do so on another host.
    """
    _refuse(directory, owner_of(directory))


def owner_of(directory: Path, /) -> Owner | None:
    """The process that holds the directory, or held it until it was interrupted."""
    try:
        return _owner(directory, (directory / LOCK).read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise ValueError(
            f"checkpoint {directory}: {LOCK} cannot be read there ({error.strerror}): choose "
            "another directory"
        ) from None


def _owner(directory: Path, text: bytes, option: str = "checkpoint") -> Owner | None:
    if not text:
        # The process was interrupted before it wrote its name.
        return None
    try:
        return Owner(**json.loads(text))
    except (ValueError, TypeError):
        raise ValueError(
            f"{option} {directory}: {LOCK} is not a lock of this library: choose another "
            "directory, or delete that file"
        ) from None


def _refuse(directory: Path, owner: Owner | None, option: str = "checkpoint") -> None:
    if owner is None or owner.ended:
        return
    holder = f"process {owner.pid} on host {owner.host}"
    if owner.host == socket.gethostname():
        of_ranks = (
            "; ranks that divide the vectors of one run by `space=sharded(params, mesh)` share one"
        )
        raise ValueError(
            f"{option} {directory}: {holder} is running in this directory: wait until it has "
            f"ended, or choose another directory{of_ranks if option == 'checkpoint' else ''}"
        )
    raise ValueError(
        f"{option} {directory}: {holder} holds this directory, and this host, "
        f"{socket.gethostname()}, cannot see whether that process has ended: if it has, delete "
        f"{directory / LOCK}; else choose another directory"
    )


@contextlib.contextmanager
def _exclusive(path: Path) -> Iterator[int]:
    """The open file, which no other process or thread has opened in this way."""
    # Only POSIX systems have it, and only runs with a checkpoint need it.
    import fcntl

    with _threads:
        while True:
            file = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
            try:
                # A file system without locks leaves a moment in which two runs can both begin.
                with contextlib.suppress(OSError):
                    fcntl.lockf(file, fcntl.LOCK_EX)
                if not _is_at(path, file):
                    # Another run removed it while this one waited.
                    continue
                yield file
                return
            finally:
                os.close(file)


def _is_at(path: Path, file: int) -> bool:
    try:
        return os.path.samestat(path.stat(), os.fstat(file))
    except FileNotFoundError:
        return False


def _start_time(pid: int) -> str | None:
    """The start time of a process of this host; None where there is no such process."""
    if not Path("/proc/self/stat").exists():
        words = ["ps", "-o", "lstart=", "-p", str(pid)]
        return subprocess.run(words, capture_output=True, text=True).stdout.strip() or None
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return None
    # The name of the command, in parentheses, may hold anything; the state comes after it.
    state, *fields = text.rpartition(")")[2].split()
    return None if state in "ZX" else fields[18]
