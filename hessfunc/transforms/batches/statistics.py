"""Sums over batches of the statistics from which a matrix with structure is made."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor


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
