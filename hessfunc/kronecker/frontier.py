"""Joint Hessian of the loss with respect to the frontier of a backward pass.

No tensor of the frontier depends on another one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class _Row:
    """Hessian with respect to one tensor, and its mixed derivatives with the others."""

    own: Tensor
    mixed: Mapping[int, Tensor]


class Frontier:
    """Blocks of the symmetric matrix that is propagated backwards through a graph.

    At the start, the frontier contains the outputs only. Each step replaces its output by its
    inputs. Where paths branch, the frontier contains several tensors and their mixed derivatives.

    For z = f(x) with Jacobian J and any other tensor y of the frontier, the chain rule gives

        H_xx = J' H_zz J + sum_k g_k Hess z_k,    H_yx = H_yz J.
    """

    def __init__(self, outputs: int, hessian: Tensor) -> None:
        self._parts = {(outputs, outputs): hessian}

    def take(self, number: int, /) -> _Row | None:
        """Remove one tensor, and return its row; None if the loss does not depend on it."""
        own = self._parts.pop((number, number), None)
        mixed = {a: part for (a, b), part in self._parts.items() if b == number}
        self._parts = {pair: part for pair, part in self._parts.items() if number not in pair}
        return None if own is None else _Row(own, mixed)

    def add(self, predecessors: Sequence[int], hessian: Sequence[Sequence[Tensor]], /) -> None:
        """Add a matrix on the inputs of a step, given as one block for each pair of inputs."""
        for i, a in enumerate(predecessors):
            for j, b in enumerate(predecessors):
                if a == b or i < j:
                    self._add(a, b, hessian[i][j])

    def add_mixed(self, other: int, predecessors: Sequence[int], rows: Sequence[Tensor], /) -> None:
        """Add the mixed derivatives of one tensor and the inputs of a step."""
        for source, part in zip(predecessors, rows, strict=True):
            if source == other:
                # The tensor is itself an input: both H_yx and H_xy add to its own block.
                self._add(other, other, part + part.mT)
            else:
                self._add(other, source, part)

    def _add(self, a: int, b: int, part: Tensor) -> None:
        known = self._parts.get((a, b))
        total = part if known is None else known + part
        self._parts[a, b] = total
        if a != b:
            self._parts[b, a] = total.mT
