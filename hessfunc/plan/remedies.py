"""What would make a run fit that does not."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from hessfunc.plan.algorithms import Algorithm, Lanczos
from hessfunc.plan.memory import Setting
from hessfunc.plan.network import BYTES
from hessfunc.plan.plans import plan

__all__ = ["Remedy", "fewest_ranks", "remedies", "whole"]

# The most ranks that are thought of.
_MOST_RANKS = 2**16


@dataclass(frozen=True)
class Remedy:
    """A run, and where its basis lies.

    Attributes:
        how: what is changed.
        setting: with the change.
        algorithm: with the change.
        offloaded: whether the basis lies in host memory.
    """

    how: str
    setting: Setting
    algorithm: Algorithm
    offloaded: bool = False

    @property
    def peak(self) -> int:
        """Bytes of each rank."""
        moments = plan(self.setting, self.algorithm).moments
        return max((m.without("basis") if self.offloaded else m).total for m in moments)

    def fits(self, memory: int, /) -> bool:
        """Whether a rank of so many bytes has room; a basis is cut where algorithms do so."""
        if self.offloaded:
            return self.peak <= memory
        try:
            return plan(self.setting, self.algorithm, memory=memory).peak.total <= memory
        except MemoryError:
            return False

    def on(self, ranks: int, /) -> Remedy:
        """The same on so many ranks, with sharded vectors."""
        return replace(self, setting=replace(self.setting, ranks=ranks, sharded=True))


def remedies(setting: Setting, algorithm: Algorithm, /) -> Iterator[Remedy]:
    """Changes that take less memory on as many ranks, each alone, and at last all of them."""
    network, smallest = setting.network, algorithm
    least = setting
    if not setting.sharded and setting.ranks > 1:
        least = replace(least, sharded=True)
        yield Remedy("space=hf.sharded(params, mesh)", least, algorithm)
    if isinstance(algorithm, Lanczos) and algorithm.basis_dtype != "bfloat16":
        smallest = replace(algorithm, basis_dtype="bfloat16")
        yield Remedy("basis_dtype=torch.bfloat16", setting, smallest)
    if network.itemsize > BYTES["bfloat16"]:
        network = network.in_bfloat16()
        how = "parameters in bfloat16"
        yield Remedy(how, replace(setting, network=network), algorithm)
    if network.recomputed is not None:
        network = network.computed_again()
        again = replace(setting, network=setting.network.computed_again())
        yield Remedy('functional(recompute="layers.*")', again, algorithm)
    how, fewer = algorithm.smaller()
    smallest = smallest.smaller()[1]
    yield Remedy(how, setting, fewer)
    yield Remedy("the basis in host memory", setting, algorithm, offloaded=True)
    least = replace(least, network=network)
    yield Remedy("all of these", least, smallest, offloaded=True)


def fewest_ranks(remedy: Remedy, memory: int, /) -> int | None:
    """The fewest ranks with sharded vectors that have room; None if no number of them has."""
    low, high = 0, _MOST_RANKS
    if not remedy.on(high).fits(memory):
        return None
    while high - low > 1:
        middle = (low + high) // 2
        if remedy.on(middle).fits(memory):
            high = middle
        else:
            low = middle
    return high


def whole(setting: Setting, algorithm: Algorithm, /) -> int:
    """Bytes that each rank holds at the peak however many there are: what is not sharded."""
    return Remedy("", setting, algorithm).on(_MOST_RANKS).peak
