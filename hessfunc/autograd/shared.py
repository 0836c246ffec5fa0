"""Settings that torch has only for the whole process."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any


class Shared:
    """Setting of the process that several threads hold together.

    The first thread changes the setting and the last one restores it, so that threads which
    overlap do not restore each other's value. Threads that do not hold the setting see it too.

    Args:
        changed: Function that returns a context manager which changes the setting.
    """

    def __init__(self, changed: Callable[[], AbstractContextManager[Any]]) -> None:
        self._changed = changed
        self._lock = threading.Lock()
        self._holders = 0
        self._active: AbstractContextManager[Any] | None = None

    @contextmanager
    def held(self) -> Iterator[None]:
        """Context manager in which the setting is changed."""
        with self._lock:
            if self._holders == 0:
                self._active = self._changed()
                self._active.__enter__()
            self._holders += 1
        try:
            yield
        finally:
            with self._lock:
                self._holders -= 1
                if self._holders == 0 and self._active is not None:
                    self._active.__exit__(None, None, None)
                    self._active = None
