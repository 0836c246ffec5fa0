"""Alternatives that are verified, and then timed in turn with a gradient."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

from bench import baselines
from bench.interleaved import Turns, ratio
from bench.speed.asked import Alternative, Asked, Work
from bench.speed.cells import Row
from bench.speed.device import wait

_GRADIENT = "a gradient"
NOT_INSTALLED = "not installed"


@dataclass(frozen=True)
class Effort:
    """How long a cell is timed.

    Attributes:
        seconds: after which no round is begun, if there are enough.
        least: the fewest rounds.
        most: the most.
    """

    seconds: float = 30.0
    least: int = 5
    most: int = 300


class Judged(NamedTuple):
    """Of an answer: its error, and the products that it took."""

    error: float
    products: float


@dataclass(frozen=True)
class Prepared:
    """An alternative that was called once.

    Attributes:
        alternative: which.
        work: of which the call is timed.
        judged: what it returned.
        seconds: of that call, which may have warmed it up.
    """

    alternative: Alternative
    work: Work
    judged: Judged
    seconds: float


@dataclass(frozen=True)
class Timed:
    """The seconds of each alternative, round by round: of one product, or of the answer."""

    gradients: Sequence[float]
    seconds: Mapping[str, Sequence[float]]


def prepared(
    asked: Asked, alternatives: Sequence[Alternative], judge: Callable[[Any], Judged]
) -> tuple[list[Prepared], dict[str, str]]:
    """The alternatives that work, each with a net of its own, and why the others do not.

    Args:
        asked: of all.
        alternatives: in the order of the table.
        judge: of an answer.
    """
    ready, gaps = [], {}
    for alternative in alternatives:
        try:
            work = alternative.make(asked.own())
            start = time.perf_counter()
            found = work.call()
            wait()
            seconds = time.perf_counter() - start
            ready.append(Prepared(alternative, work, judge(work.answer(found)), seconds))
        except Exception as broken:
            # One that breaks down is a finding, and must not end the run of the others.
            gaps[alternative.title] = reason_of(broken)
    return ready, gaps


def reason_of(broken: Exception) -> str:
    """What went wrong, in one line."""
    text = " ".join(str(broken).split())
    if isinstance(broken, ModuleNotFoundError):
        return f"{NOT_INSTALLED} ({text})"
    return f"{type(broken).__name__}: {text[:200]}"


def timed(
    asked: Asked,
    ready: Sequence[Prepared],
    effort: Effort,
    tolerance: float,
    *,
    each: bool = True,
) -> Timed:
    """All whose answer is right in turn, with a gradient among them.

    Args:
        asked: of all.
        ready: what is timed.
        effort: for how long.
        tolerance: of errors.
        each: divide the time of a call by its products.
    """
    right = {o.alternative.title: o for o in ready if o.judged.error <= tolerance}
    turns = Turns(
        {
            _GRADIENT: partial(gradient_of, asked),
            **{title: _to_its_end(one.work.call) for title, one in right.items()},
        }
    )
    gradient_of(asked)
    taken(turns, effort)
    return Timed(
        turns.seconds[_GRADIENT],
        {
            title: [s / (one.judged.products if each else 1) for s in turns.seconds[title]]
            for title, one in right.items()
        },
    )


def _to_its_end(call: Callable[[], Any]) -> Callable[[], None]:
    def called() -> None:
        call()
        wait()

    return called


def taken(turns: Turns, effort: Effort) -> None:
    """Rounds, as many as the effort allows."""
    start = time.perf_counter()
    for done in range(effort.most):
        if done >= effort.least and time.perf_counter() - start > effort.seconds:
            break
        turns.take()


def gradient_of(asked: Asked) -> None:
    """A gradient of the batch, or of all batches."""
    for inputs, targets in asked.batches or [(asked.case.inputs, asked.case.targets)]:
        baselines.gradient(replace(asked.case, inputs=inputs, targets=targets))
    wait()


def rows_of(ready: Sequence[Prepared], found: Timed) -> dict[str, Row]:
    """The row of each alternative; those whose answer is wrong have the cost of one call."""
    ours = [o.alternative.title for o in ready if o.alternative.kind == "ours"]
    rows = {}
    for one in ready:
        title, spent = one.alternative.title, found.seconds.get(one.alternative.title)
        rows[title] = Row(
            kind=one.alternative.kind,
            gradients=ratio(spent or [one.seconds], found.gradients if spent else [_unit(found)]),
            ours={
                name: ratio(found.seconds[name], spent)
                for name in ours
                if spent and name != title and name in found.seconds
            },
            error=one.judged.error,
            products=one.judged.products,
            alike=one.alternative.alike,
            note=one.work.note,
        )
    return rows


def _unit(found: Timed) -> float:
    return statistics.median(found.gradients)
