"""The joint Hessian of the loss with respect to tensors that no path leads between."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class _Row:
    """The Hessian with respect to one tensor, and its mixed derivatives with the others."""

    own: Tensor
    mixed: Mapping[int, Tensor]


class Frontier:
    """The blocks of a symmetric matrix that goes back through a graph.

    It begins at the outputs. A tensor is taken out when its step is passed, and what its step
    reads comes in; where paths part, several are in it at once, with their mixed derivatives.
    """

    def __init__(self, outputs: int, hessian: Tensor) -> None:
        self._parts = {(outputs, outputs): hessian}

    def take(self, number: int, /) -> _Row | None:
        """Take out one tensor; None where the loss does not depend on it."""
        own = self._parts.pop((number, number), None)
        mixed = {a: part for (a, b), part in self._parts.items() if b == number}
        self._parts = {pair: part for pair, part in self._parts.items() if number not in pair}
        return None if own is None else _Row(own, mixed)

    def add(self, sources: Sequence[int], hessian: Sequence[Sequence[Tensor]], /) -> None:
        """Add a matrix on the inputs of a step, one block a pair of inputs."""
        for i, a in enumerate(sources):
            for j, b in enumerate(sources):
                if a == b or i < j:
                    self._add(a, b, hessian[i][j])

    def add_mixed(self, other: int, sources: Sequence[int], rows: Sequence[Tensor], /) -> None:
        """Add the mixed derivatives of one tensor and the inputs of a step."""
        for source, part in zip(sources, rows, strict=True):
            if source == other:
                self._add(other, other, part + part.mT)
            else:
                self._add(other, source, part)

    def _add(self, a: int, b: int, part: Tensor) -> None:
        known = self._parts.get((a, b))
        total = part if known is None else known + part
        self._parts[a, b] = total
        if a != b:
            self._parts[b, a] = total.mT
