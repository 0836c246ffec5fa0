"""Driver of all algorithms: the loop over rounds.

An algorithm is a `Method`: a frozen dataclass of its options, with pure functions of its state.
`run_method` adds the space, the seed, the budget, the callback and the checkpoint, which all runs
have in common. A method can also be stepped by hand:

    products = Products.of(matvec, like)
    state, budget = method.init(products, 0), 100
    while (room := budget - products.matvecs) > 0 and not method.verdict(state, products, room):
        state = method.step(state, products, room)
    result = method.result(state, products.space, products.cost("converged", 0))
"""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, ClassVar, Generic, TypedDict, TypeVar

from hessfunc.algorithms.checkpoint import Checkpoint, Directory
from hessfunc.algorithms.products import Cost, Products
from hessfunc.algorithms.results import Result
from hessfunc.display import NOTHING, Achieved, Report, Reported, reporting
from hessfunc.spaces.space import Space

State = TypeVar("State")
AnyResult = TypeVar("AnyResult", bound=Result)
Callback = Callable[[AnyResult], object]

# Reason of a running result, which a callback receives.
RUNNING = "running"


class RunOptions(TypedDict, total=False):
    """Options of a run, which mean the same for every algorithm.

    Attributes:
        seed: Seed of all random vectors. By default a fresh seed is drawn, and the result records
            it.
        space: Vector space in which every rank holds a part of each vector, made by `sharded`. By
            default vectors are replicated.
        callback: Function of the running result, called after each round. The run stops when it
            returns True.
        progress: Function of a `Progress`, called after each round; it cannot stop the run. True
            shows a bar in a terminal or a notebook, and elsewhere a line on standard error every 30
            seconds.
        checkpoint: Directory in which the state of the run is saved after each round, so that an
            interrupted run can be resumed.
        memory: Bytes that the run may take on each rank, see `memory_limit`.
    """

    seed: int | None
    space: Space | None
    callback: Callback[Any] | None
    progress: Reported
    checkpoint: Directory
    memory: float | None


class Method(ABC, Generic[State, AnyResult]):
    """Algorithm, a frozen dataclass of options with pure functions of its state.

    A state is a frozen dataclass of tensors, numbers and tuples, or a tuple of such states. Its
    `Rows` are divided among ranks in the same way as vectors; see `hessfunc.spaces.space`.

    Attributes:
        changeable: Names of the options that a resumed run may change.
        is_random: Whether the algorithm uses random vectors, so that results record the seed.
    """

    changeable: ClassVar[frozenset[str]] = frozenset({"rtol", "atol"})
    is_random: ClassVar[bool] = True

    @abstractmethod
    def init(self, products: Products, seed: int, /) -> State:
        """Return the state before the first round.

        Args:
            products: Products of the run. A method that starts from a given vector may make one.
            seed: Seed of all random vectors.
        """

    @abstractmethod
    def step(self, state: State, products: Products, room: int, /) -> State:
        """Return the state after one more round of at most ``room`` matvecs.

        The state is returned unchanged if a round needs more matvecs.

        Args:
            state: State before the round.
            products: Products of the run.
            room: Number of matvecs that the budget leaves.
        """

    def verdict(self, state: State, products: Products, room: int, /) -> str | None:
        """Return the reason to stop the run, or None to continue.

        Args:
            state: State after a round.
            products: Products of the run. The verdict makes none.
            room: Number of matvecs that the budget leaves.
        """
        return None

    def finish(
        self, state: State, products: Products, reason: str, room: int, /
    ) -> tuple[State, str]:
        """Return the final state and the reason, after checks with the remaining products.

        Args:
            state: State after the last round.
            products: Products of the run.
            reason: Reason for which the run stopped.
            room: Number of matvecs that the budget leaves.
        """
        return state, reason

    @abstractmethod
    def result(self, state: State, space: Space, cost: Cost, /) -> AnyResult:
        """Return the result of a running or final state.

        Args:
            state: State after at least one round.
            space: Space of the vectors.
            cost: Matvecs, passes, reason and seed of the run.
        """

    def achieved(self, state: State, space: Space, cost: Cost, /) -> Achieved:
        """Return the numbers that show the progress of a running state.

        By default they are those of the running result. A method whose result costs vectors
        overrides it.

        Args:
            state: State after at least one round.
            space: Space of the vectors.
            cost: Matvecs, passes, reason and seed of the run.
        """
        return self.result(state, space, cost).achieved()

    def options(self) -> dict[str, Any]:
        """Return the options that a resumed run must not change, by name."""
        return {
            option.name: getattr(self, option.name)
            for option in dataclasses.fields(self)  # type: ignore[arg-type]
            if option.name not in self.changeable
        }


def run_method(
    method: Method[State, AnyResult],
    products: Products,
    run: RunOptions,
    /,
    *,
    max_matvecs: int,
    kept: int = 0,
) -> AnyResult:
    """Run a method until its verdict, the budget or the callback ends the run.

    Args:
        method: Algorithm with its options.
        products: Products of the run, in the space of the run.
        run: Options of the run.
        max_matvecs: Budget of matvecs.
        kept: Number of matvecs that are reserved for `Method.finish`.
    """
    callback, store = run.get("callback"), store_of(method, products, run)
    space, seed = products.space, store.seed
    recorded = seed if method.is_random else None
    # All ranks make a running result together, even if only one of them has a callback.
    watched = space.least(callback is None) == 0

    def stops(state: State, report: Report | None) -> bool:
        cost = products.cost(RUNNING, recorded)
        if report is not None:
            report(products.matvecs, method.achieved(state, space, cost))
        return watched and _says_stop(space, callback, method.result(state, space, cost))

    with reported(products, run, type(method).__name__, max_matvecs) as report:
        # The first state has no name here, which would keep its workspace in memory during the run.
        state, reason = _rounds(
            method.init(products, seed),
            method,
            products,
            store,
            max_matvecs - kept,
            lambda state: stops(state, report),
        )
        state, reason = method.finish(state, products, reason, max_matvecs - products.matvecs)
        cost = products.cost(reason, recorded)
        result = method.result(state, space, cost)
        if report is not None:
            last = result.achieved()
            report(
                products.matvecs, method.achieved(state, space, cost) if last == NOTHING else last
            )
    return result


@contextmanager
def reported(
    products: Products, run: RunOptions, task: str, total: int, /
) -> Iterator[Report | None]:
    """Yield the function that reports the progress of a run on all ranks, or None.

    Args:
        products: Products of the run.
        run: Options of the run.
        task: Name of the method.
        total: Budget of matvecs.
    """
    progress, space = run.get("progress"), products.space
    # All ranks report together, even if only one of them shows its progress.
    if space.least(not progress) == 1:
        yield None
        return
    with reporting(progress, task, total=total) as report:

        def together(done: int, achieved: Achieved = NOTHING, /) -> None:
            space.on_all(lambda: None if report is None else report(done, achieved))

        yield together


def store_of(method: Method[Any, Any], products: Products, run: RunOptions, /) -> Checkpoint:
    """Return the checkpoint of a run, which also holds its seed.

    Raises:
        ValueError: If the directory contains anything but a state of this run.
    """
    name = type(method).__name__
    checkpoint, seed = run.get("checkpoint"), run.get("seed")
    return Checkpoint.of(checkpoint, name, products, seed, **method.options())


def _rounds(
    state: State,
    method: Method[State, AnyResult],
    products: Products,
    store: Checkpoint,
    max_matvecs: int,
    stops: Callable[[State], bool],
) -> tuple[State, str]:
    """Make rounds until the run stops, and return the last state with the reason."""
    try:
        state = store.restored(state)
        while (reason := method.verdict(state, products, max_matvecs - products.matvecs)) is None:
            before, room = products.matvecs, max_matvecs - products.matvecs
            if room < 1:
                return state, f"budget exhausted after {before} matvecs"
            state = method.step(state, products, room)
            store.save(state)
            if stops(state):
                return state, "stopped by the callback"
            if products.matvecs == before:
                return state, (
                    f"budget exhausted after {before} of {max_matvecs} matvecs (a round needs "
                    "more than the rest)"
                )
        return state, reason
    finally:
        store.release()


def _says_stop(space: Space, callback: Callback[AnyResult] | None, result: AnyResult) -> bool:
    """Return whether the callback has returned True on any rank.

    Ranks must agree, and a callback may look at a clock, which differs between ranks.
    """

    def continues() -> bool:
        return callback is None or callback(result) is not True

    return space.least(space.on_all(continues)) == 0
