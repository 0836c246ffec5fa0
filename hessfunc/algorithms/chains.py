"""Online decision between Krylov vectors of several chains and random probes.

A Krylov vector that reduces the variance of a probe by its fraction g saves g times all probes of a
run. It therefore pays if g needed > 1, where ``needed`` is the number of probes that the run needs
from now on. The next vector of a chain is predicted to reduce the variance like its last ones.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace

from torch import Tensor

# Least number of steps of the first chain, and largest number of steps of later ones. In the Krylov
# space of a random vector, the second vector is the first one that large eigenvalues dominate.
_FIRST = 3
# Number of steps, and of later chains, whose mean predicts the next one.
_RECENT = 3
_RATES = 4
# Largest share of the variance that a step is expected to remove before one was made.
_LARGEST = 0.9


@dataclass(frozen=True)
class Chains:
    """Reductions of the variance by the steps of all chains so far.

    A reduction is the logarithm of the factor by which a step has reduced the variance of a probe.
    The first chain may be long. A single chain contains each repeated eigenvalue once, so later
    chains start at other random vectors. Their length is the most profitable length of the first
    chain, up to three.

    Attributes:
        count: Number of chains.
        first: Reductions by the first chain.
        current: Reductions by the last chain, if it is not the first.
        rates: Mean reductions by later chains before the last one, of the last few only.
        length: Number of steps of later chains.
    """

    count: int = 0
    first: tuple[float, ...] = ()
    current: tuple[float, ...] = ()
    rates: tuple[float, ...] = ()
    length: int = _FIRST

    def choice(
        self, needed: float, alive: Collection[int], expected: Callable[[], float], /
    ) -> int | None:
        """Return the chain of the next Krylov vector, or None for random probes.

        Args:
            needed: Number of probes that the run needs from now on.
            alive: Numbers of the chains that have a next vector.
            expected: Function that returns the reduction by a step as expected without any step,
                from `expected_reduction`. The reduction counts like one more step, until three
                have been measured.

        Returns:
            Number of a chain to continue, or ``count`` for a new one.
        """

        def pays(reduction: float) -> bool:
            return -math.expm1(-reduction) * needed > 1

        if not self.count:
            return 0 if pays(expected()) else None
        if 0 in alive and len(self.first) < _FIRST and needed > 1:
            return 0
        last = self.count - 1
        if last and last in alive and len(self.current) < self.length and needed > 1:
            return last
        continued = 0.0
        if 0 in alive:
            prior = [expected()] if len(self.first) <= _FIRST else []
            continued = _mean([*self.first[-_RECENT:], *prior])
        if last:
            rates = [*self.rates, _mean(self.current)]
            started = _mean([*rates, *([expected()] if len(rates) < _RECENT else [])])
        else:
            # The first chain is more certain than a start, until it no longer pays.
            started = 0.0 if pays(continued) else max(expected(), *_means(self.first))
        if pays(continued) and continued >= started:
            return 0
        return self.count if pays(started) else None

    def extended(self, chain: int, reduction: float, /) -> Chains:
        """Return the record with one more step.

        Args:
            chain: Number of the chain, or ``count`` for a new one.
            reduction: Logarithm of the factor by which the step has reduced the variance.
        """
        count = max(self.count, chain + 1)
        if chain == 0:
            return replace(self, count=count, first=(*self.first, reduction))
        if chain < self.count:
            return replace(self, current=(*self.current, reduction))
        rates = self.rates
        if self.current:
            rates = (*rates, _mean(self.current))[1 - _RATES :]
        means = _means(self.current or self.first)
        length = min(self.length, 1 + means.index(max(means)))
        return replace(self, count=count, current=(reduction,), rates=rates, length=length)


def _mean(numbers: Sequence[float]) -> float:
    return sum(numbers) / len(numbers)


def _means(numbers: Sequence[float]) -> list[float]:
    """Return the means of the first one, two, ... numbers."""
    return [_mean(numbers[:count]) for count in range(1, len(numbers) + 1)]


def expected_reduction(gram: Tensor, /) -> float:
    """Return the reduction by an eigenvector of a symmetric matrix S, before any step.

    The mean of the shares ``lambda_i^2 / |S|_F^2``, weighted by themselves, is
    ``tr S^4 / (tr S^2)^2``. Both traces follow from the products S u with random u,

        tr S^2 = E |S u|^2,  tr S^4 = E <S u, S v>^2.

    Args:
        gram: Gram matrix of the products S u, float64 ``(p, p)`` with p > 1.
    """
    p, square = len(gram), float(gram.diagonal().mean())
    if not square > 0:
        return 0.0
    # The ratio does not depend on the scale of the products, whose fourth powers may overflow.
    gram = gram / square
    share = float(gram.square().sum() - gram.diagonal().square().sum()) / (p * (p - 1))
    return -math.log1p(-min(share, _LARGEST))
