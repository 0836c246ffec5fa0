"""What an algorithm does, counted."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["Work"]


@dataclass(frozen=True)
class Work:
    """The work of one rank.

    Attributes:
        steps: rounds of the algorithm, each with one block of products.
        block: the vectors of these blocks.
        checks: products of one vector that follow at the most.
        traffic: bytes of vectors that all steps read and write.
        sums: numbers of float64 that are added up over ranks in one step, where vectors are
            sharded.
        exchanges: collectives of one step, those of the products not counted.
    """

    steps: int
    block: int
    checks: int
    traffic: float
    sums: float
    exchanges: float

    @property
    def products(self) -> int:
        """With one vector, at the most."""
        return self.steps * self.block + self.checks
