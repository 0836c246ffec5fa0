"""Exact traces and diagonals of small matrices, from products with all unit vectors."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from hessfunc.algorithms.matrix import unit_products
from hessfunc.algorithms.norms import squared_diagonal, squared_frobenius, squared_row_norms
from hessfunc.algorithms.products import Products
from hessfunc.algorithms.results import DiagonalEstimate, Estimate
from hessfunc.algorithms.results.estimate import leaf_fields
from hessfunc.algorithms.statistics import FEWEST_SAMPLES, rounding_of_sum
from hessfunc.algorithms.symmetry import mixture
from hessfunc.display import Report
from hessfunc.spaces.space import Space, products_eps, rows_dtype

_EXACT = "exact: all unit vectors were multiplied"
# Dimension up to which unit vectors are preferred if the budget leaves too few random probes.
_SMALL = 60
# Dimension above which all unit vectors take too much memory.
_LARGEST = 4096


def random_budget(products: Products, max_matvecs: int, /, *, tolerance: bool) -> int:
    """Return the number of products for random probes before all unit vectors cost less.

    Without a tolerance, n unit vectors are better than a budget of at least n random probes. With a
    tolerance, random probes may reach it earlier. They get n products, or the products that the
    budget leaves beside n unit vectors. If these are too few, a matrix of dimension up to 60 is
    multiplied by its unit vectors only, and a larger one by random probes only.

    Args:
        products: Products of the run.
        max_matvecs: Budget of the run.
        tolerance: Whether the run may stop before its budget is exhausted.
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
        random: Result of `random_budget`.
        reason: Reason for which the random probes stopped.
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
    report: Report | None = None,
    known: Tensor | None = None,
) -> Estimate:
    """Return the trace up to rounding, in n matvecs.

    Args:
        products: Products of the run.
        seed: Seed of the run.
        max_matvecs: Budget of the run, of which at least n matvecs must remain.
        block_size: Number of vectors that are multiplied at once.
        report: Function that reports the progress of the run, or None.
        known: Trace of the part that the matvec leaves out, by leaf, float64 ``(leaves,)``.

    Raises:
        ValueError: If the matvec is not deterministic or not linear.
    """
    space, rows, images, rounding, reason = _products(products, max_matvecs, block_size, report)
    parts = space.by_leaf(rows, images).sum(0).cpu().double()
    parts = parts if known is None else parts + known
    squares = space.norms(images).cpu().double().square().sum()
    frobenius = None
    if known is None:
        frobenius = squared_frobenius(squares.expand(2), space, products.cost(reason, seed))
        frobenius = replace(
            frobenius, stderr=rounding_of_sum(products_eps(space)) * frobenius.value, reason=reason
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
    products: Products,
    seed: int,
    /,
    *,
    max_matvecs: int,
    block_size: int,
    report: Report | None = None,
) -> DiagonalEstimate:
    """Return the diagonal up to rounding, in n matvecs, with the arguments of `exact_trace`."""
    space, rows, images, rounding, reason = _products(products, max_matvecs, block_size, report)
    diagonal = (rows * images).sum(0)
    squares = images.double().square().sum(0)
    parts = space.by_leaf(rows, images).sum(0).tolist()
    sample = diagonal[None].double()
    of_squares = squared_diagonal(sample, space, products.cost(reason, seed))
    size = float(space.norms(sample))
    return DiagonalEstimate(
        value=space.unravel(diagonal),
        stderr=space.unravel(torch.full_like(diagonal, rounding)),
        degrees=space.n,
        squared_row_norms=squared_row_norms(
            squares, 0 * squares, space.n, space, products.cost(reason, seed)
        ),
        by_leaf=dict(zip(space.names, parts, strict=True)),
        leaf_stderr=dict.fromkeys(space.names, rounding),
        sum_of_squares=replace(
            of_squares,
            stderr=2 * rounding * size,
            leaf_stderr=dict.fromkeys(space.names, 2 * rounding * size),
            reason=reason,
        ),
        **products.cost(reason, seed),
    )


def _products(
    products: Products, max_matvecs: int, block_size: int, report: Report | None
) -> tuple[Space, Tensor, Tensor, float, str]:
    """Return the space, all unit vectors, their products, the rounding of a sum, and a reason.

    If the products are not symmetric, one more tests whether they are deterministic and linear.
    """
    space = products.space
    everything = torch.arange(space.n, device=space.device)
    rows = space.units(everything, rows_dtype(space))
    pieces = []
    for piece in unit_products(products, space, everything, block_size):
        pieces.append(piece)
        if report is not None:
            report(products.matvecs)
    images = torch.cat(pieces)
    lengths = space.norms(images).cpu().double()
    rounding = rounding_of_sum(products_eps(space)) * float(lengths.norm())
    matrix = space.entries(images, everything).double()
    asymmetry = float((matrix - matrix.mT).abs().max())
    # Products of a random matvec are not symmetric, except for a matrix with a single entry.
    if space.n > 1 and asymmetry <= products_eps(space) ** 0.5 * float(lengths.max()):
        return space, rows, images, rounding, _EXACT
    if products.matvecs >= max_matvecs:
        return space, rows, images, rounding, f"{_EXACT}, if the matvec is deterministic and linear"
    weights = mixture(space.n)[None]
    image = products(space.combine(weights, rows))
    difference = float(space.norms(image - space.combine(weights, images)))
    if difference > products_eps(space) ** 0.5 * float(lengths.norm()):
        raise ValueError(
            "the matvec is not deterministic or not linear: the product with a combination of unit "
            f"vectors differs by {difference:.1e} from the combination of their products. Call "
            "model.eval() if the loss has dropout, fix the seed of random numbers within the loss, "
            "and call `check(matvec, like)` for details"
        )
    return space, rows, images, rounding, _EXACT
