"""Traces and diagonals of small matrices, from the products of all unit vectors."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from hessfunc.algorithms.norms import squared_frobenius, squared_row_norms
from hessfunc.algorithms.products import Products
from hessfunc.algorithms.results import DiagonalEstimate, Estimate, leaf_fields
from hessfunc.algorithms.statistics import FEWEST_SAMPLES, rounding_of_sum
from hessfunc.algorithms.symmetry import measured_rounding
from hessfunc.spaces.space import Space, products_eps, rows_dtype

_EXACT = "exact: all unit vectors were multiplied"
_SMALL = 60
# All unit vectors of more entries than this take too much memory.
_LARGEST = 4096
# Differences of w'Av and v'Aw that the rounding of a product explains, in units of its length.
_ROUNDINGS = 10.0
# The rounding of products in 16 bits, in units of their length, through a few layers.
_COARSEST = 0.03


def random_budget(products: Products, max_matvecs: int, /, *, tolerance: bool) -> int:
    """Return how many products random probes may take before all unit vectors cost less.

    Without a tolerance, n unit vectors are better than a budget of n random ones. With one, random
    probes may reach it earlier: they are given as many products, or what is left over. Where next
    to nothing is left over, the unit vectors of a small matrix come first, and those of a larger
    one are not multiplied at all.

    Args:
        products: Products of the run.
        max_matvecs: Budget of the run.
        tolerance: Whether the run may stop earlier.
    """
    n = products.space.n
    if n > min(max_matvecs, _LARGEST):
        return max_matvecs
    most = min(n, max_matvecs - n) if tolerance else 0
    if most > FEWEST_SAMPLES:
        return most
    return max_matvecs if tolerance and n > _SMALL else 0


def unit_vectors_left(products: Products, max_matvecs: int, random: int, reason: str, /) -> bool:
    """Return whether all unit vectors should be multiplied after random probes.

    Args:
        products: Products of the run.
        max_matvecs: Budget of the run.
        random: What `random_budget` returned.
        reason: Why random probes stopped.
    """
    if random == max_matvecs or reason.startswith(("converged", "exact", "stopped")):
        return False
    return products.matvecs + products.space.n <= max_matvecs


def exact_trace(
    products: Products,
    seed: int,
    /,
    *,
    max_matvecs: int,
    block_size: int,
    known: Tensor | None = None,
) -> Estimate:
    """Return the trace up to rounding, in n matvecs.

    Args:
        products: Products of the run.
        seed: Seed of the run.
        max_matvecs: Budget of the run, at least n above what it has taken.
        block_size: Number of vectors that are multiplied at once.
        known: Trace of a part that the matvec leaves out, leaf by leaf.
    """
    space, rows, images, rounding, reason = _products(products, max_matvecs, block_size)
    parts = space.by_leaf(rows, images).sum(0).cpu().double()
    parts = parts if known is None else parts + known
    squares = space.norms(images).cpu().double().square().sum()
    frobenius = None
    if known is None:
        frobenius = squared_frobenius(squares.expand(2), space, products.cost(reason, seed))
        frobenius = replace(
            frobenius, stderr=rounding_of_sum(_eps(space)) * frobenius.value, reason=reason
        )
    return Estimate(
        value=float(parts.sum()),
        stderr=rounding,
        degrees=space.n,
        samples=parts.sum()[None],
        **leaf_fields(space, parts, [rounding] * len(parts)),
        squared_frobenius=frobenius,
        **products.cost(reason, seed),
    )


def exact_diagonal(
    products: Products, seed: int, /, *, max_matvecs: int, block_size: int
) -> DiagonalEstimate:
    """Return the diagonal up to rounding, in n matvecs; arguments are those of `exact_trace`."""
    space, rows, images, rounding, reason = _products(products, max_matvecs, block_size)
    diagonal = (rows * images).sum(0)
    squares = images.double().square().sum(0)
    return DiagonalEstimate(
        value=space.unravel(diagonal),
        stderr=space.unravel(torch.full_like(diagonal, rounding)),
        degrees=space.n,
        squared_row_norms=squared_row_norms(
            squares, 0 * squares, space.n, space, products.cost(reason, seed)
        ),
        **products.cost(reason, seed),
    )


def refuse_asymmetric(products: Products, probes: Tensor, images: Tensor, /) -> None:
    """Raise if products A w_i of probes w_i do not satisfy ``w_i'A w_j = w_j'A w_i``.

    Where they differ by more than the dtype explains, the rounding of the products is measured, as
    a model in low precision may have parameters in float32.

    Raises:
        ValueError: If the matrix is not symmetric, or if its products are random.
    """
    space, p = products.space, len(probes)
    if p < 2:
        return
    forms = space.gram(probes, images).cpu().double()
    length = float(space.norms(images).square().mean().sqrt())
    # The rounding e of a product is no more along a probe w than along others: w'e is about |e|.
    difference = float((forms - forms.mT).norm()) / math.sqrt(p * (p - 1))
    if difference <= _eps(space) ** 0.5 * length:
        return
    if difference > _ROUNDINGS * _rounding_of_products(products, probes):
        raise ValueError(
            f"the matvec is not symmetric, or not deterministic: v'Aw and w'Av differ by "
            f"{difference:.1e} for random v and w, where |Aw| is {length:.1e}. Take `hutchinson` "
            "for a matrix that is not symmetric, and call model.eval() if the loss is random"
        )


def _rounding_of_products(products: Products, probes: Tensor) -> float:
    """Return the rounding of a product A w, and 0 where the same product twice differs as well."""
    size = float(products.space.norms(probes[:1]))
    rounding, random, length = measured_rounding(products, probes[:1])
    small = rounding <= _COARSEST * length
    return size * rounding if small and random <= rounding / 10 else 0.0


def _eps(space: Space) -> float:
    return products_eps(space, rows_dtype(space))


def _products(
    products: Products, max_matvecs: int, block_size: int
) -> tuple[Space, Tensor, Tensor, float, str]:
    """Return the space, all unit vectors, their products, the rounding of a sum, and a reason."""
    space = products.space
    rows = space.units(rows_dtype(space))
    images = torch.cat([products(block) for block in rows.split(block_size)])
    lengths = space.norms(images).cpu().double()
    rounding = rounding_of_sum(_eps(space)) * float(lengths.norm())
    matrix = images.double() if space.ranks is None else space.gram(rows, images)
    asymmetry = float((matrix - matrix.mT).abs().max())
    # Random products are not symmetric, unless there is a single entry.
    if space.n > 1 and asymmetry <= _eps(space) ** 0.5 * float(lengths.max()):
        return space, rows, images, rounding, _EXACT
    if products.matvecs >= max_matvecs:
        return space, rows, images, rounding, f"{_EXACT}, if the same product twice is the same"
    difference = float(space.norms(products(rows[:1]) - images[:1]))
    if difference > _eps(space) ** 0.5 * float(lengths[0]):
        raise ValueError(
            f"the matvec is not deterministic: the same product twice differs by {difference:.1e} "
            f"of {float(lengths[0]):.1e}. Call model.eval() if the loss has dropout, or pass a "
            "seed to what it samples"
        )
    return space, rows, images, rounding, _EXACT
