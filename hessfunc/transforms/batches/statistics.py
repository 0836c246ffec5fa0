"""Sums over batches of the statistics from which a matrix with structure is made."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeAlias, runtime_checkable

import torch
from torch import Tensor

from hessfunc.numerics import wide_dtype
from hessfunc.transforms.batches.reductions import Average
from hessfunc.transforms.batches.sums import refuse_no_weight
from hessfunc.trees import Matvec, Tree


@dataclass(frozen=True)
class Statistics:
    """Sums over the examples of a batch.

    Attributes:
        weighted: Tensors that scale with the loss, which are averaged over batches like it.
        summed: Sums over terms that do not depend on the loss, each with the number of its terms.
    """

    weighted: Mapping[str, Tensor]
    summed: Mapping[str, tuple[Tensor, float]] = field(default_factory=dict)

    def mean(self) -> dict[str, Tensor]:
        """Return the tensors of one batch by name, with each sum divided by its number of terms."""
        means = {name: total / count for name, (total, count) in self.summed.items()}
        return {**self.weighted, **means}

    def _weighted(self, weight: float) -> Statistics:
        """Return the statistics whose means count with a weight."""
        means = {
            name: (weight * part / count, weight) for name, (part, count) in self.summed.items()
        }
        return Statistics(self.weighted, means)


Stage: TypeAlias = Callable[[Tree, Any], Statistics]


@runtime_checkable
class OfStatistics(Protocol):
    """Curvature function whose matrix of a data set is made from statistics of its batches."""

    def over_batches(
        self,
        params: Tree,
        mean: Callable[[Stage], Mapping[str, Tensor]],
        each: Callable[[Callable[[Tensor], Tensor], Sequence[Tensor]], list[Tensor]],
        /,
    ) -> Matvec:
        """Return the matrix of a data set.

        Args:
            params: Parameters.
            mean: Function that returns the means of statistics over the data set, in one pass.
            each: Function that applies another one to each matrix of a list, in parallel on ranks.
        """


def of_statistics(curvature: object, /) -> OfStatistics | None:
    """Return a curvature function that is made from statistics, or None for another one."""
    return curvature if isinstance(curvature, OfStatistics) else None


@dataclass(frozen=True)
class Total:
    """Weighted sum of the statistics of batches.

    Attributes:
        statistics: Sum over the batches.
        weight: Total weight of the batches.
    """

    statistics: Statistics
    weight: float

    @classmethod
    def of(cls, batches: Iterable[tuple[Statistics, float]], /, *, given: bool = False) -> Total:
        """Sum the statistics of batches, given each with its weight.

        Args:
            batches: Statistics and weight of each batch.
            given: Whether the user has given the weights. The means of `Statistics.summed` are
                then weighted by them instead of by their numbers of terms.
        """
        total: Total | None = None
        for made, weight in batches:
            one = cls(made._weighted(weight) if given else made, weight)._scaled()
            total = one if total is None else total._plus(one)
        return cls(Statistics({}), 0.0) if total is None else total

    def _scaled(self) -> Total:
        scaled = {
            name: self.weight * part.to(torch.promote_types(part.dtype, torch.float32))
            for name, part in self.statistics.weighted.items()
        }
        return Total(Statistics(scaled, self.statistics.summed), self.weight)

    def _plus(self, other: Total) -> Total:
        one, two = self.statistics, other.statistics
        if one.weighted.keys() != two.weighted.keys() or one.summed.keys() != two.summed.keys():
            raise ValueError(
                "the model uses its parameters in another way in another batch, so that their "
                "blocks have different structures: use batches of the same kind"
            )
        weighted = {name: part + two.weighted[name] for name, part in one.weighted.items()}
        summed = {
            name: (part + two.summed[name][0], count + two.summed[name][1])
            for name, (part, count) in one.summed.items()
        }
        return Total(Statistics(weighted, summed), self.weight + other.weight)

    def mean(self, average: Average, /) -> dict[str, Tensor]:
        """Return the means by name, if the batches are combined in this way.

        Raises:
            ValueError: If the weights sum to zero.
        """
        refuse_no_weight(self.weight)
        divisor = average.divisor(self.weight)
        weighted = {name: part / divisor for name, part in self.statistics.weighted.items()}
        return Statistics(weighted, self.statistics.summed).mean()

    def _tensors(self) -> list[Tensor]:
        sums = [part for part, _ in self.statistics.summed.values()]
        return [*self.statistics.weighted.values(), *sums]

    def flat(self, device: torch.device, /) -> Tensor:
        """Return all sums, their numbers of terms and the weight as one vector."""
        wide = wide_dtype(device)
        counts = [count for _, count in self.statistics.summed.values()]
        last = torch.tensor([*counts, self.weight], dtype=wide, device=device)
        return torch.cat([*(tensor.flatten().to(wide) for tensor in self._tensors()), last])

    def unflattened(self, flat: Tensor, /) -> Total:
        """Return the total whose numbers are a vector as `flat` returns it."""
        weighted, summed = self.statistics.weighted, self.statistics.summed
        tensors = self._tensors()
        *parts, last = flat.split([*(tensor.numel() for tensor in tensors), len(summed) + 1])
        parts = [p.view(t.shape).to(t.dtype) for p, t in zip(parts, tensors, strict=True)]
        *counts, weight = last.tolist()
        sums = zip(parts[len(weighted) :], counts, strict=True)
        statistics = Statistics(
            dict(zip(weighted, parts, strict=False)), dict(zip(summed, sums, strict=True))
        )
        return Total(statistics, weight)
