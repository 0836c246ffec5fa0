"""Timing of alternatives that take turns.

On a shared machine the seconds of one run say little: clocks, caches and neighbours change from
one second to the next. Alternatives that are called one after another, each once a round, see the
same machine. So only their ratio within a round is read, and of these the median over rounds.
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Ratio:
    """The median over rounds of a ratio, and its quartiles."""

    median: float
    low: float
    high: float


def ratio(above: Sequence[float], below: Sequence[float]) -> Ratio:
    """The ratio of two alternatives, from their times in each round; of one it has no spread."""
    found = [a / b for a, b in zip(above, below, strict=True)]
    if len(found) == 1:
        return Ratio(found[0], found[0], found[0])
    low, median, high = statistics.quantiles(found, n=4, method="inclusive")
    return Ratio(median, low, high)


@dataclass
class Turns:
    """Alternatives that are called in turn, and the seconds that each has taken.

    Attributes:
        alternatives: what is called, by name.
        seconds: of each call, by name, round by round.
    """

    alternatives: Mapping[str, Callable[[], object]]
    seconds: dict[str, list[float]] = field(init=False)

    def __post_init__(self) -> None:
        self.seconds = {name: [] for name in self.alternatives}
        self._shuffle = random.Random(0).shuffle

    def take(self) -> None:
        """One round: each alternative once."""
        names = list(self.alternatives)
        # In a fixed order each would always find the caches as the same other one leaves them.
        self._shuffle(names)
        for name in names:
            call = self.alternatives[name]
            start = time.perf_counter()
            call()
            self.seconds[name].append(time.perf_counter() - start)
