"""Labelled examples in memory, as trainings and problems use them."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Examples:
    """Labelled examples in two tensors.

    Attributes:
        inputs: Inputs ``[N, ...]``.
        targets: Class indices ``[N]``.
    """

    inputs: Tensor
    targets: Tensor

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: slice) -> Examples:
        return Examples(self.inputs[index], self.targets[index])

    def batches(self, size: int) -> list[tuple[Tensor, Tensor]]:
        """Split into pairs ``(inputs, targets)`` of ``size`` examples; the last may be smaller."""
        return list(zip(self.inputs.split(size), self.targets.split(size), strict=True))
