"""Estimators that choose online between deflation and random probes."""

from __future__ import annotations

import math
from abc import abstractmethod
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from hessfunc.algorithms.chains import expected_reduction
from hessfunc.algorithms.checkpoint import Columns
from hessfunc.algorithms.deflation import PILOT, Deflation
from hessfunc.algorithms.krylov import Krylov
from hessfunc.algorithms.probing import AnyResult, Probing
from hessfunc.algorithms.products import IN_FLOAT32, Products
from hessfunc.algorithms.span import Span
from hessfunc.algorithms.symmetry import refuse_asymmetric_forms
from hessfunc.spaces.space import ProbeKind, Space

# Number of probes that are multiplied at once by default. They are decided upon together.
BLOCK = 4
# Number of probes that predict the reduction by a step which no step has shown yet.
_PREDICTING = 32
# Least tolerance whose square is a normal number.
_TINIEST = 1e-150
# Least factor by which a step is taken to reduce the variance.
_LEAST = 1e-30


class Samples(Protocol):
    """Samples of the part S of a matrix that is not deflated."""

    @property
    def norm(self) -> float:
        """Estimate of the part of ``|S|_F^2`` to which the variance of a probe is proportional."""

    def rounding(self, space: Space) -> float:
        """Return the error of the value from the rounding of the products."""


@dataclass(frozen=True, kw_only=True)
class AdaptiveDeflation(Probing[Deflation, AnyResult]):
    """Exact value of the deflated part, and samples of the rest.

    Attributes:
        span: Span of the given eigenpairs.
        krylov: Krylov space of a given density.
        kind: Distribution of the probes.
        of_diagonal: Whether the diagonal is needed besides the trace.
        margin: Number of probes that Student's quantile costs more than the normal one.
    """

    span: Span
    krylov: Krylov

    kind: ClassVar[ProbeKind]
    of_diagonal: ClassVar[bool]
    margin: ClassVar[float] = 0.0

    @abstractmethod
    def samples(self, state: Deflation, space: Space, /) -> Samples:
        """Return the samples of the probes so far."""

    @abstractmethod
    def images(self, state: Deflation, samples: Any, space: Space, most: int, /) -> Tensor:
        """Return the products S w with the first probes, at most so many."""

    def certain(self, grown: Deflation, samples: Any, /) -> float:
        """Return a lower bound of the fall of the norm by the last basis vector, by default 0.

        Args:
            grown: State with that vector.
            samples: Samples of the state before.
        """
        return 0.0

    @abstractmethod
    def tolerance(self, samples: Any, space: Space, /) -> float:
        """Return the absolute tolerance of a run that has one."""

    @abstractmethod
    def probes_within(self, tolerance: float, samples: Any, /) -> float:
        """Return the number of probes whose error is about the tolerance."""

    def options(self) -> dict[str, Any]:
        given = {"span": Columns(self.span.basis), "krylov": Columns(self.krylov.basis)}
        return {**super().options(), **given}

    def count(self, state: Deflation, /) -> int:
        return len(state.probes)

    def kept(self, state: Deflation, /) -> int:
        return len(state.basis) + len(state.probes)

    def init(self, products: Products, seed: int, /) -> Deflation:
        space = products.space
        self.span.refuse_another_matrix(products)
        self.krylov.refuse_another_matrix(products)
        none = Deflation.none(space, seed, diagonal=self.of_diagonal)
        return self.krylov.deflated(none, space)

    def step(self, state: Deflation, products: Products, room: int, /) -> Deflation:
        space, p, width = products.space, len(state.probes), min(self.block_size, room)
        if p < PILOT:
            return state.probed(products, self.span, min(width, PILOT - p), self.kind)
        if space.dtype != torch.float64:
            products.refuse_scale(IN_FLOAT32)
        if p == PILOT and not len(state.basis):
            # Later, deflation leaves so little of the products that rounding looks like asymmetry.
            refuse_asymmetric_forms(products, state.probes, state.images)
        if not (self.has_tolerance or _is_due(p, self.block_size)):
            return state.probed(products, self.span, width, self.kind)
        samples = self.samples(state, space)
        needed, norm = self._needed(samples, space, p + room), samples.norm
        is_left = space.n - len(self.span) - len(state.basis) > 2
        if is_left and norm > samples.rounding(space) ** 2:

            def expected() -> float:
                images = self.images(state, samples, space, _PREDICTING)
                return expected_reduction(space.gram(images, images).cpu().double())

            chain = state.chains.choice(needed, state.alive, expected)
            if chain is not None:
                grown = state.extended(products, self.span, chain)
                # The removed part is certain, and the samples of few probes are not.
                left = self.samples(grown, space).norm
                left = min(left, norm - self.certain(grown, samples))
                reduction = math.log(norm / max(left, norm * _LEAST))
                return replace(grown, chains=grown.chains.extended(chain, reduction))
        if self.has_tolerance:
            width = min(width, max(1, self.fewest - p, math.floor(needed + self.margin - p)))
        return state.probed(products, self.span, width, self.kind)

    def _needed(self, samples: Samples, space: Space, most: int) -> float:
        """Return the number of probes that the tolerance or, without one, the budget needs."""
        if not self.has_tolerance:
            return most
        if samples.norm == 0:
            return 0.0
        tolerance = self.tolerance(samples, space)
        # The number of probes is in proportion to 1 / tolerance^2, which must not overflow.
        if tolerance <= _TINIEST:
            return most
        needed = self.probes_within(tolerance, samples)
        # Fewer probes than the least number of a run save nothing.
        return min(most, needed) if needed + self.margin > self.fewest else 0.0

    def finish(
        self, state: Deflation, products: Products, reason: str, room: int, /
    ) -> tuple[Deflation, str]:
        """Return the last state and the reason, after a check of the symmetry of the matvec.

        Raises:
            ValueError: If the matvec is not symmetric or not deterministic.
        """
        if not len(state.basis):
            refuse_asymmetric_forms(products, state.probes, state.images)
        return state, reason


def _is_due(p: int, width: int) -> bool:
    """Return whether the last probes have crossed a multiple of about a sixth of their number.

    Fewer probes change the estimates of the next decision by less than their error. A run without
    a tolerance decides nothing else by them.
    """
    interval = 1 << max(p.bit_length() - 3, 0)
    return p // interval > (p - width) // interval
