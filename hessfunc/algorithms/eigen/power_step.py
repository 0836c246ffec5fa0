"""Steps of power iteration outside of the accepted vectors, with a test of symmetry."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from hessfunc.algorithms.basis import Basis, project_out
from hessfunc.algorithms.products import Products
from hessfunc.algorithms.symmetry import refuse_unless_rounding
from hessfunc.spaces.space import DIVIDED, Rows, Space


@dataclass(frozen=True)
class PowerState:
    """Iterate, its predecessor and product, and the accepted vectors with their products.

    A step overwrites the rows of the previous state.

    Attributes:
        current: Iterate of unit length; empty once all pairs are accepted.
        previous: Predecessor, scaled with the iterate; empty without momentum.
        image: Product A w of the iterate, without the shift; None before it is computed.
        vectors: Accepted vectors, in a workspace that a state shares with its successor.
        images: Products of the accepted vectors.
        shift: Multiple of I that is added to A; None before the dominant eigenvalue, which
            determines it, is known.
        trusted: Whether the pairs come from random vectors, or a random vector has shown that no
            pair is missed.
        seed: Seed of the random vectors.
        steps: Steps since the iterate was a random unit vector u.
        growth: Logarithm of ``|A^steps u|``.
        longest: Length of the longest product.
        asymmetry: Largest difference of u'Av and v'Au so far, for an iterate u and the next one v.
        rounded: Measured difference that the rounding of products explains, in units of
            ``longest``.
    """

    current: Rows = field(metadata=DIVIDED)
    previous: Rows = field(metadata=DIVIDED)
    image: Rows | None = field(metadata=DIVIDED)
    vectors: Rows = field(metadata=DIVIDED)
    images: Rows = field(metadata=DIVIDED)
    shift: float | None
    trusted: bool
    seed: int
    steps: int = 0
    growth: float = 0.0
    longest: float = 0.0
    asymmetry: float = 0.0
    rounded: float = 0.0


def iterated(
    space: Space, products: Products, state: PowerState, momentum: float, symmetric: float
) -> PowerState:
    """Return the state after one product: that of the iterate, or that of the next iterate.

        w_{t+1} = P ((A + shift I) w_t - b w_{t-1}),  P = I - V'V

    Args:
        space: Space of the vectors.
        products: Products with A.
        state: State whose rows are overwritten.
        momentum: Momentum b.
        symmetric: Asymmetry that is let through, relative to the longest product.

    Raises:
        ValueError: If the matvec is not symmetric or not deterministic.
    """
    if state.image is None:
        return replace(state, image=products(state.current))
    before = state.current
    moved = state.image.add_(state.current, alpha=state.shift or 0.0)
    if momentum:
        moved.add_(state.previous, alpha=-momentum)
    moved = outside(space, moved, state.vectors)
    length = float(space.norms(moved))
    previous = state.previous
    if length > 0:
        previous = state.current.div_(length) if momentum else previous
        moved /= length
    else:
        # A w = 0 exactly: w is an eigenvector of value 0, and is kept.
        moved = state.current.clone()
    image = products(moved)
    if length > 0:
        # With momentum, u was divided by the length in place: u = unit * before.
        unit = length if momentum else 1.0
        # v = (A u + shift u - b w) / length is orthogonal to the accepted vectors, so that
        # v'A u = length - shift u'v + b w'v.
        backward = length
        if state.shift:
            backward -= state.shift * unit * float(space.gram(before, moved))
        if momentum:
            backward += momentum * float(space.gram(state.previous, moved))
        difference = abs(unit * float(space.gram(before, image)) - backward)
        state = _compared(space, products, state, moved, image, difference, symmetric)
    if not momentum:
        # The iterate before is not needed any more, and the caller keeps its memory.
        image = before.copy_(image)
    return replace(
        state,
        current=moved,
        previous=previous,
        image=image,
        steps=state.steps + 1,
        growth=state.growth + (math.log(length) if length > 0 else -math.inf),
    )


def _compared(
    space: Space,
    products: Products,
    state: PowerState,
    row: Tensor,
    image: Tensor,
    difference: float,
    symmetric: float,
) -> PowerState:
    """Return the state after a test of symmetry on a product and the previous one."""
    longest = max(state.longest, float(space.norms(image)))
    rounded = refuse_unless_rounding(
        products, row, difference, longest, max(symmetric, state.rounded)
    )
    asymmetry = max(state.asymmetry, difference)
    if (longest, asymmetry, rounded) == (state.longest, state.asymmetry, state.rounded):
        return state
    return replace(state, longest=longest, asymmetry=asymmetry, rounded=rounded)


def quotient(space: Space, state: PowerState) -> tuple[float, float]:
    """Return the Rayleigh quotient, and the residual outside of the accepted vectors."""
    assert state.image is not None
    value = float(space.gram(state.current, state.image))
    residual = torch.add(state.image, state.current, alpha=-value)
    return value, float(space.norms(outside(space, residual, state.vectors)))


def longest_product(space: Space, state: PowerState) -> float:
    """Return the length of the longest current product, a lower bound of |A|."""
    products = [rows for rows in (state.images, state.image) if rows is not None and len(rows)]
    return max((float(space.norms(rows).max()) for rows in products), default=0.0)


def outside(space: Space, rows: Tensor, basis: Tensor) -> Tensor:
    """Subtract the projections on orthonormal rows, in place."""
    if len(basis):
        for _ in range(2):
            project_out(space, rows, Basis(basis))
    return rows
