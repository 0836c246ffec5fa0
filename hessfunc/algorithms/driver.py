"""The one driver of rounds: products that are counted, a budget, a tolerance, a callback."""

from __future__ import annotations

import secrets
from collections.abc import Callable
from typing import Protocol, TypeVar

from hessfunc.algorithms.products import Products
from hessfunc.algorithms.results import Result
from hessfunc.spaces.space import Space

State = TypeVar("State")
Found = TypeVar("Found", bound=Result)
Callback = Callable[[Found], object]


class Storage(Protocol):
    """What keeps the state of a run, for this run alone from `restored` until `release`."""

    def restored(self, state: State, /) -> State: ...

    def save(self, state: object, /) -> None: ...

    def release(self) -> None: ...


def drive(
    state: State,
    *,
    products: Products,
    step: Callable[[State, int], State],
    verdict: Callable[[State], str | None],
    running: Callable[[State], Found],
    max_matvecs: int,
    callback: Callback[Found] | None,
    storage: Storage | None = None,
) -> tuple[State, str]:
    """Take rounds until there is a verdict, the budget is spent, or the callback says stop.

    Args:
        state: where the run starts.
        products: that count what is spent.
        step: ``(state, room) -> state``, one round of at most ``room`` matvecs.
        verdict: why the run is finished, in words, or None.
        running: the result so far, for the callback.
        max_matvecs: the budget of all rounds.
        callback: called with the result so far after each round; returning True stops.
        storage: where the state is taken up, and kept after each round.

    Returns:
        The last state, and the reason for which the run stopped.
    """
    # The result so far is computed by all ranks together, whoever looks at it.
    watched = products.space.least(callback is None) == 0
    try:
        if storage is not None:
            state = storage.restored(state)
        while (reason := verdict(state)) is None:
            room = max_matvecs - products.matvecs
            if room < 1:
                return state, f"the budget of {max_matvecs} matvecs is spent"
            before = products.matvecs
            state = step(state, room)
            if storage is not None:
                storage.save(state)
            if watched and _says_stop(products.space, callback, running(state)):
                return state, "stopped by the callback"
            if products.matvecs == before:
                return state, (
                    f"the budget of {max_matvecs} matvecs is spent but for {room}, too few for a "
                    "round"
                )
        return state, reason
    finally:
        if storage is not None:
            storage.release()


def _says_stop(space: Space, callback: Callback[Found] | None, found: Found) -> bool:
    """Whether the callback has returned True, on any rank: a clock is not the same on each."""

    def goes_on() -> bool:
        return callback is None or callback(found) is not True

    return space.least(space.on_all(goes_on)) == 0


def drawn(space: Space, seed: int | None) -> int:
    """The seed, or a fresh one, the same on all ranks, which the result records."""
    return space.least(secrets.randbits(63)) if seed is None else seed
