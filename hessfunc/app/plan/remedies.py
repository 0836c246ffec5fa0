"""Changes that make a run fit in memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from hessfunc.app.plan.algorithms import Algorithm, Lanczos, PowerIteration
from hessfunc.app.plan.footprint import Moment, Setting
from hessfunc.app.plan.machine import Machine

# Maximum number of ranks that are considered.
_MOST_RANKS = 2**16
# Number of microbatches into which a batch is divided.
_MICROBATCHES = 8


@dataclass(frozen=True)
class Remedy:
    """Run with a change that may reduce its memory.

    Attributes:
        how: Description of the change, as code if possible.
        setting: Network and ranks with the change.
        algorithm: Algorithm with the change.
        offloaded: Whether the basis is in host memory.
        gradients: Gradients that a product costs in addition.
    """

    how: str
    setting: Setting
    algorithm: Algorithm
    offloaded: bool = False
    gradients: float = 0.0

    @property
    def peak(self) -> int:
        """Peak memory per rank, in bytes."""
        moments = plan(self.setting, self.algorithm).moments
        return max((m.without("basis") if self.offloaded else m).total for m in moments)

    def fits(self, memory: int, /) -> bool:
        """Return whether the run fits in ``memory`` bytes per rank, after reducing its basis."""
        if self.offloaded:
            return self.peak <= memory
        try:
            return plan(self.setting, self.algorithm, memory=memory).peak.total <= memory
        except MemoryError:
            return False

    def seconds(self, machine: Machine, /) -> float:
        """Return the seconds of the run, with the products that its algorithm states.

        A smaller or coarser basis may take more products, which no size tells.
        """
        bandwidth = machine.host_bandwidth if self.offloaded else machine.memory_bandwidth
        machine = replace(
            machine,
            product_gradients=machine.product_gradients + self.gradients,
            memory_bandwidth=bandwidth,
        )
        return machine.in_all(self.setting, self.algorithm.workload(self.setting)).seconds

    def of(self, how: str, /, **setting: Any) -> Remedy:
        """Return the run in a setting with other fields."""
        return replace(self, how=how, setting=replace(self.setting, **setting))

    def on(self, ranks: int, /) -> Remedy:
        """Return the run on ``ranks`` ranks, with sharded vectors."""
        return replace(self, setting=replace(self.setting, ranks=ranks, sharded=True))


def remedies(setting: Setting, algorithm: Algorithm, /) -> Iterator[Remedy]:
    """Yield the changes that reduce memory on the same ranks: each alone, then all combined."""
    unchanged = every = Remedy("all of these", setting, algorithm)
    for change in _CHANGES:
        alone = change(unchanged)
        if alone.peak < unchanged.peak:
            yield alone
            combined = replace(change(every), how=every.how)
            every = min(every, combined, key=lambda remedy: remedy.peak)
    yield every


def _with_a_coarse_basis(run: Remedy) -> Remedy:
    if not isinstance(run.algorithm, Lanczos):
        return run
    algorithm = replace(run.algorithm, basis_dtype="bfloat16")
    return replace(run, how="basis_dtype=torch.bfloat16", algorithm=algorithm)


def _with_layers_computed_again(run: Remedy) -> Remedy:
    network = run.setting.network.computed_again()
    # A product evaluates each layer once more, and its backward pass.
    gradients = run.gradients + (network != run.setting.network)
    how = 'functional(recompute="layers.*")'
    return replace(run.of(how, network=network), gradients=gradients)


def _with_divided_parameters(run: Remedy) -> Remedy:
    network, is_divided = run.setting.network, run.setting.divided
    if network.block is None or run.setting.ranks == 1 or is_divided:
        return run
    how = 'functional(model, mesh=mesh, shard="layers.*")'
    # The layers of a sharded model are recomputed.
    again = _with_layers_computed_again(run)
    return again.of(how, network=again.setting.network, divided=True)


def _by_power_iteration(run: Remedy) -> Remedy:
    if not isinstance(run.algorithm, Lanczos):
        return run
    power = PowerIteration(run.algorithm.k)
    how = f"power_iteration(k={power.k}), at most {power.steps} products"
    return replace(run, how=how, algorithm=power)


def _with_less_to_find(run: Remedy) -> Remedy:
    how, algorithm = run.algorithm.smaller()
    return replace(run, how=how, algorithm=algorithm)


_CHANGES: tuple[Callable[[Remedy], Remedy], ...] = (
    lambda run: run.of("space=hf.sharded(params, mesh)", sharded=True),
    _with_a_coarse_basis,
    lambda run: run.of(
        "functional(model.bfloat16(), dtype=torch.float32)",
        network=run.setting.network.stored_in_bfloat16(),
    ),
    lambda run: run.of("parameters in bfloat16", network=run.setting.network.in_bfloat16()),
    lambda run: run.of("language_model_loss(model)", network=run.setting.network.without_logits()),
    lambda run: run.of(
        f"microbatches(batch, size / {_MICROBATCHES})",
        network=run.setting.network.in_microbatches(_MICROBATCHES),
    ),
    _with_layers_computed_again,
    _with_divided_parameters,
    _with_less_to_find,
    _by_power_iteration,
    lambda run: replace(run, how="the basis in host memory", offloaded=True),
)


def cheapest(
    setting: Setting, algorithm: Algorithm, memory: int, machine: Machine
) -> Remedy | None:
    """Return the change that fits in ``memory`` bytes per rank in the least time, or None."""
    fitting = [remedy for remedy in remedies(setting, algorithm) if remedy.fits(memory)]
    return min(fitting, key=lambda remedy: remedy.seconds(machine), default=None)


def fewest_ranks(remedy: Remedy, memory: int, /) -> int | None:
    """Return the smallest number of ranks on which the run fits, with sharded vectors, or None."""
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
    """Return the replicated bytes at the peak, which do not shrink with the number of ranks."""
    return Remedy("", setting, algorithm).on(_MOST_RANKS).peak


@dataclass(frozen=True)
class Plan:
    """Memory of an algorithm on each rank.

    Attributes:
        setting: Network and ranks.
        algorithm: Algorithm as it runs. Its basis is smaller than requested if the requested basis
            does not fit in half of the free memory.
        moments: Phases in which the memory may be largest, in the order of the algorithm.
    """

    setting: Setting
    algorithm: Algorithm
    moments: tuple[Moment, ...]

    @property
    def peak(self) -> Moment:
        """Phase with the largest memory."""
        return max(self.moments, key=lambda moment: moment.total)


def plan(setting: Setting, algorithm: Algorithm, /, *, memory: int | None = None) -> Plan:
    """Return the memory plan of an algorithm on each rank, from sizes alone.

    Args:
        setting: Network and ranks.
        algorithm: `Lanczos`, `Slq`, `Hutchinson` or `Xtrace`.
        memory: Bytes per rank. If given, the algorithm reduces its basis to this memory, as it
            does when it runs.

    Raises:
        MemoryError: If the algorithm cannot start in that memory.
    """
    if memory is not None:
        taken = sum(setting.parameters.values())
        algorithm = algorithm.fitted(setting, max(0, memory - taken))
    return Plan(setting, algorithm, tuple(algorithm.moments(setting)))
