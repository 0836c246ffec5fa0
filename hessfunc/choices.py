"""What was chosen by a timed trial, so that it can be recorded, and made again when resumed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

__all__ = ["Choices", "current_choices", "recording"]

Choices = dict[str, int]

_current: ContextVar[Choices | None] = ContextVar("choices", default=None)


@contextmanager
def recording(choices: Choices, /) -> Iterator[None]:
    """Inside, choices are looked up in this dict before they are made, and written to it."""
    token = _current.set(choices)
    try:
        yield
    finally:
        _current.reset(token)


def current_choices() -> Choices:
    """The dict in use; one that nobody reads outside of `recording`."""
    found = _current.get()
    return {} if found is None else found
