"""What would make a run fit that does not."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from hessfunc.app.plan.algorithms import Algorithm, Lanczos
from hessfunc.app.plan.footprint import Moment, Setting

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
    as_it_is = every = Remedy("all of these", setting, algorithm)
    for change in (
        _with_sharded_vectors,
        _with_a_coarse_basis,
        _with_coarse_parameters,
        _with_layers_computed_again,
        _with_less_to_find,
        _with_an_offloaded_basis,
    ):
        alone = change(as_it_is)
        if alone.peak < as_it_is.peak:
            yield alone
            every = replace(change(every), how=every.how)
    yield every


def _with_sharded_vectors(run: Remedy) -> Remedy:
    setting = replace(run.setting, sharded=True)
    return replace(run, how="space=hf.sharded(params, mesh)", setting=setting)


def _with_a_coarse_basis(run: Remedy) -> Remedy:
    if not isinstance(run.algorithm, Lanczos):
        return run
    algorithm = replace(run.algorithm, basis_dtype="bfloat16")
    return replace(run, how="basis_dtype=torch.bfloat16", algorithm=algorithm)


def _with_coarse_parameters(run: Remedy) -> Remedy:
    setting = replace(run.setting, network=run.setting.network.in_bfloat16())
    return replace(run, how="parameters in bfloat16", setting=setting)


def _with_layers_computed_again(run: Remedy) -> Remedy:
    setting = replace(run.setting, network=run.setting.network.computed_again())
    return replace(run, how='functional(recompute="layers.*")', setting=setting)


def _with_less_to_find(run: Remedy) -> Remedy:
    how, algorithm = run.algorithm.smaller()
    return replace(run, how=how, algorithm=algorithm)


def _with_an_offloaded_basis(run: Remedy) -> Remedy:
    return replace(run, how="the basis in host memory", offloaded=True)


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
