"""Linear dependence of the output of a call on a parameter.

A call contributes ``z[n, g, o, p] = sum_k W[g, o, k] X[n, g, k, p]`` to its output. Here n counts
the rows of the output, g the groups, o the outputs of a group, k its inputs and p the positions.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from hessfunc.algorithms.results.result import Saved


@dataclass(frozen=True)
class Layout(Saved):
    """Order in which a parameter holds the weights ``W[g, o, k]`` of a grouped linear map.

    Attributes:
        view: Shape to which the parameter is reshaped.
        order: Permutation of the axes of the view to (g, o, k), where k may be several axes.
        is_entrywise: Whether the parameter multiplies or is added to single entries, as in a
            normalisation. Each of its entries is a group of its own.
    """

    view: tuple[int, ...]
    order: tuple[int, ...] = (0, 1, 2)
    is_entrywise: bool = False

    @property
    def sizes(self) -> tuple[int, int, int]:
        """Numbers of groups G, of outputs O of a group, and of its inputs K."""
        groups, outputs, *inputs = (self.view[axis] for axis in self.order)
        return groups, outputs, torch.Size(inputs).numel()

    @property
    def is_plain(self) -> bool:
        """Whether the entries of the parameter are in the order (g, o, k)."""
        return self.order == tuple(range(len(self.order)))

    @property
    def is_matrix(self) -> bool:
        """Whether the parameter holds one matrix, ``W[o, k]`` or its transpose."""
        return len(self.view) == 3 and self.view[0] == 1 and not self.is_entrywise

    def of_transposed(self) -> Layout | None:
        """Return the layout of the transposed parameter, or None if it is not a matrix."""
        if not self.is_matrix:
            return None
        swap = {0: 0, 1: 2, 2: 1}
        view = (1, self.view[2], self.view[1])
        return Layout(view, (0, swap[self.order[1]], swap[self.order[2]]))

    @property
    def transpose(self) -> Layout | None:
        """Layout in which the inputs of a matrix are its outputs, or None without a matrix."""
        return Layout(self.view, (0, self.order[2], self.order[1])) if self.is_matrix else None

    def permuted(self, rows: Tensor) -> Tensor:
        """Return the entries of a parameter, ``(k, n)``, as weights ``(k, G, O, K)``."""
        view = rows.reshape(len(rows), *self.view)
        return view.permute(0, *(1 + axis for axis in self.order)).reshape(len(rows), *self.sizes)

    def restored(self, weights: Tensor, shape: torch.Size) -> Tensor:
        """Return weights ``(..., G, O, K)`` in the order of the parameter, ``(..., *shape)``."""
        lead = weights.dim() - 3
        moved = weights.reshape(*weights.shape[:lead], *(self.view[axis] for axis in self.order))
        inverse = sorted(range(len(self.order)), key=self.order.__getitem__)
        moved = moved.permute(*range(lead), *(lead + axis for axis in inverse))
        return moved.reshape(*weights.shape[:lead], *shape)


@dataclass(frozen=True)
class OneHot:
    """Inputs X of a lookup: the unit vectors of indices.

    Attributes:
        indices: Index of each row and position, ``(N, P)``. The index K has no input.
        size: Number of inputs K.
    """

    indices: Tensor
    size: int


Inputs: TypeAlias = Tensor | OneHot


def as_vectors(inputs: Inputs, like: Tensor, /) -> Tensor:
    """Return inputs as vectors ``(B, G, K, P)`` with the dtype of a tensor."""
    if isinstance(inputs, Tensor):
        return inputs.to(like)
    # The index K has no input.
    vectors = torch.nn.functional.one_hot(inputs.indices, inputs.size + 1)[..., :-1]
    return vectors.mT[:, None].to(like)


@dataclass(frozen=True)
class LinearMap:
    """Dependence of the output of one call on a parameter.

    Attributes:
        layout: Order of the weights in the parameter.
        slopes: Function from the gradient at the output to its rows, ``(N, G, O, P)``.
        inputs: Function that returns the inputs X, ``(N, G, K, P)``, or ``(1, G, K, P)`` if all
            rows share them.
        source: Tensor whose rows are the inputs, if they are; else None.
    """

    layout: Layout
    slopes: Callable[[Tensor], Tensor]
    inputs: Callable[[], Inputs]
    source: Tensor | None = None
