"""Labelled examples in memory, as the trainings and problems hold them."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Examples:
    """Labelled examples.

    Attributes:
        inputs: ``[N, ...]``.
        targets: class indices, ``[N]``.
    """

    inputs: Tensor
    targets: Tensor

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: slice) -> Examples:
        return Examples(self.inputs[index], self.targets[index])

    def batches(self, size: int) -> list[tuple[Tensor, Tensor]]:
        """Cut into ``(inputs, targets)`` of ``size`` examples in order; the last may be smaller."""
        return list(zip(self.inputs.split(size), self.targets.split(size), strict=True))
