"""Lock of a directory of checkpoints or results, which one run at a time holds."""

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

# File locks of the operating system exclude other processes, but not other threads of this process.
_threads = threading.Lock()


@dataclass(frozen=True)
class Owner:
    """Process that holds a directory.

    Attributes:
        host: Name of the host.
        pid: Process ID on that host.
        started: Start time of the process as the operating system reports it, since process IDs are
            reused.
        run: Prefix of the files that the run writes.
    """

    host: str
    pid: int
    started: str
    run: str

    @classmethod
    def here(cls, run: str, /) -> Owner:
        """Return the owner for the current process."""
        return cls(socket.gethostname(), os.getpid(), _start_time(os.getpid()) or "", run)

    @property
    def ended(self) -> bool:
        """Whether the process is known to have ended; False for a process of another host."""
        return self.host == socket.gethostname() and _start_time(self.pid) != self.started


def acquire(directory: Path, run: str, /, *, option: str = "checkpoint") -> Owner:
    """Lock the directory for this process, even if a process that has ended still holds it.

    Args:
        directory: Directory, which must exist.
        run: Prefix of the files that the run writes.
        option: Name of the option with the directory, for messages.

    Raises:
        ValueError: If another run holds the directory.
    """
    mine = Owner.here(run)
    with _exclusive(directory / LOCK) as file:
        _refuse(directory, _owner(directory, os.read(file, 4096), option), option)
        os.ftruncate(file, 0)
        os.pwrite(file, json.dumps(asdict(mine)).encode(), 0)
        os.fsync(file)
    return mine


def release(directory: Path, mine: Owner, /) -> None:
    """Remove the lock of this run, unless another run has replaced it."""
    if owner_of(directory) == mine:
        with _exclusive(directory / LOCK) as file:
            if _owner(directory, os.read(file, 4096)) == mine:
                (directory / LOCK).unlink()


def refuse_if_held(directory: Path, /) -> None:
    """Raise an error if another run holds the directory.

    Raises:
        ValueError: If another process of this host holds the directory, or any process of another
            host.
    """
    _refuse(directory, owner_of(directory))


def owner_of(directory: Path, /) -> Owner | None:
    """Return the process that holds the directory or was interrupted while holding it, or None.

    Raises:
        ValueError: If the lock cannot be read, or is not a lock of this library.
    """
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
    """Return the owner that the text of a lock names, or None for an empty lock."""
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
    """Raise an error unless the owner is None or is known to have ended."""
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
    """Open a file for reading and writing, exclusively among processes and threads.

    Yields:
        Descriptor of the open file.
    """
    # The module exists only on POSIX systems, and only runs with a checkpoint need it.
    import fcntl

    with _threads:
        while True:
            file = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
            try:
                # On a file system without locks, two runs that start at once may both begin.
                with contextlib.suppress(OSError):
                    fcntl.lockf(file, fcntl.LOCK_EX)
                if not _is_at(path, file):
                    # Another run removed the file while this run waited.
                    continue
                yield file
                return
            finally:
                os.close(file)


def _is_at(path: Path, file: int) -> bool:
    """Return whether the path still refers to the open file."""
    try:
        return os.path.samestat(path.stat(), os.fstat(file))
    except FileNotFoundError:
        return False


def _start_time(pid: int) -> str | None:
    """Return the start time of a process of this host, or None if it does not run."""
    if not Path("/proc/self/stat").exists():
        words = ["ps", "-o", "lstart=", "-p", str(pid)]
        return subprocess.run(words, capture_output=True, text=True).stdout.strip() or None
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return None
    # The command name, in parentheses, may contain spaces and parentheses; the state follows it.
    state, *fields = text.rpartition(")")[2].split()
    return None if state in "ZX" else fields[18]
