"""The plan of a run: what each rank holds."""

from __future__ import annotations

from dataclasses import dataclass

from hessfunc.plan.algorithms import Algorithm
from hessfunc.plan.memory import Moment, Setting

__all__ = ["Plan", "plan"]


@dataclass(frozen=True)
class Plan:
    """What an algorithm takes on each rank.

    Attributes:
        setting: the network and the ranks.
        algorithm: as it runs: its basis may be smaller than was asked for, where that does not
            fit in half of what is free.
        moments: where a rank may hold the most, in the order of the algorithm.
    """

    setting: Setting
    algorithm: Algorithm
    moments: tuple[Moment, ...]

    @property
    def peak(self) -> Moment:
        return max(self.moments, key=lambda moment: moment.total)


def plan(setting: Setting, algorithm: Algorithm, /, *, memory: int | None = None) -> Plan:
    """What is alive at once on each rank, from the sizes of everything.

    Args:
        setting: the network and the ranks.
        algorithm: `Lanczos`, `Slq`, `Hutchinson` or `Xtrace`.
        memory: bytes of each rank; where given, algorithms cut their basis to it, as they do.

    Raises:
        MemoryError: the algorithm would not begin in that memory.
    """
    if memory is not None:
        taken = sum(setting.parameters.values())
        algorithm = algorithm.fitted(setting, max(0, memory - taken))
    return Plan(setting, algorithm, tuple(algorithm.moments(setting)))
