"""Tests that a matvec is symmetric, and that it is the one of earlier results."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from hessfunc.algorithms.products import Products
from hessfunc.numerics import rounding
from hessfunc.spaces.space import products_eps

# Largest difference of u'Av and v'Au that is accepted without measuring rounding, in units of |A|.
SYMMETRIC = 1e-3
# Largest difference of u'Av and v'Au that rounding explains, in units of the rounding of a product.
_ROUNDINGS = 10.0
# Largest difference of two products with one vector that counts as deterministic, in units of their
# rounding.
_REPEATED = 0.1
# Largest rounding of products in 16 bits through a few layers, in units of their length.
_COARSEST = 0.03


def refuse_asymmetric(difference: float, scale: float, tolerance: float, /) -> None:
    """Raise an error if u'Av and v'Au differ by more than a fraction of the largest eigenvalue.

    Args:
        difference: Largest |u'Av - v'Au| for unit vectors u and v.
        scale: Largest absolute eigenvalue so far.
        tolerance: Largest accepted difference, in units of the scale.

    Raises:
        ValueError: If the difference exceeds the tolerance.
    """
    if difference > tolerance * scale:
        raise _not_symmetric(difference / scale if scale else math.inf)


def refuse_asymmetric_forms(products: Products, probes: Tensor, images: Tensor, /) -> None:
    """Raise an error unless ``w_i'A w_j = w_j'A w_i`` for all probes, up to rounding.

    If both forms differ by more than the rounding of the dtype, the rounding of the products is
    measured, since a model in low precision may have parameters in float32.

    Args:
        products: Products of the run. Measuring the rounding makes three more, uncounted.
        probes: Probes w_i, rows.
        images: Products A w_i, rows.

    Raises:
        ValueError: If the matvec is not symmetric or not deterministic.
    """
    space, p = products.space, len(probes)
    eps = products_eps(space)
    if p < 2:
        return
    forms = space.gram(probes, images).cpu().double()
    length = float(space.norms(images).square().mean().sqrt())
    # The rounding error e of a product has no preferred direction, so w'e is about |e| for a probe
    # w with E[ww'] = I.
    difference = float((forms - forms.mT).norm()) / math.sqrt(p * (p - 1))
    if difference <= eps**0.5 * length:
        return
    if difference > _ROUNDINGS * _rounding_of_products(products, probes):
        raise ValueError(
            "the matvec is not symmetric, not linear or not deterministic: v'Aw and w'Av differ by "
            f"{difference:.1e} for random v and w, where |Aw| is {length:.1e}. Call "
            "`check(matvec, like)` for details. Take `hutchinson` if the matrix is not symmetric, "
            "and call model.eval() if the loss is random"
        )


def _rounding_of_products(products: Products, probes: Tensor) -> float:
    """Return the rounding of a product A w, or 0 if two products with the same vector differ."""
    size = float(products.space.norms(probes[:1]))
    rounding, random, length = measured_rounding(products, probes[:1])
    small = rounding <= _COARSEST * length
    return size * rounding if small and random <= rounding / 10 else 0.0


def refuse_unless_rounding(
    products: Products, row: Tensor, difference: float, scale: float, tolerance: float, /
) -> float:
    """Raise an error if u'Av and v'Au differ by more than a tolerance and rounding explain.

    The rounding is measured if the difference exceeds the tolerance, since a model in low precision
    may have parameters in float32.

    Args:
        products: Products of the run. Measuring the rounding makes three more, uncounted.
        row: Vector with which the rounding is measured, one row.
        difference: Difference of u'Av and v'Au for unit vectors u and v.
        scale: Largest length of a product with a unit vector so far.
        tolerance: Largest accepted difference, in units of the scale.

    Returns:
        Tolerance of the next differences, increased to the measured rounding if necessary.

    Raises:
        ValueError: If the difference exceeds both the tolerance and the measured rounding.
    """
    if difference <= tolerance * scale:
        return tolerance
    rounded, random, length = measured_rounding(products, row)
    explained = _ROUNDINGS * rounded * (scale / length if length else 0.0)
    linear = rounded <= _COARSEST * max(length, scale)
    if not linear or random > _REPEATED * rounded or difference > explained:
        raise _not_symmetric(difference / scale)
    return explained / scale


def mixture(k: int, /) -> Tensor:
    """Return weights of unit length and different size that combine k vectors, float64 ``(k,)``."""
    weights = torch.arange(1, k + 1, dtype=torch.float64, device="cpu").cos()
    return weights / weights.norm()


def refuse_another_matrix(
    products: Products, vector: Tensor, expected: Tensor, bound: float, scale: float, name: str, /
) -> None:
    """Raise an error unless a product is the one that an earlier result implies.

    Args:
        products: Products of the run. Measuring the rounding makes three more, uncounted.
        vector: Vector w of the earlier result, one row.
        expected: Product A w that the result implies, one row.
        bound: Largest length of the difference that residuals of the result explain.
        scale: Largest length of a product with a unit vector so far.
        name: Name of the argument that holds the result, for messages.

    Raises:
        ValueError: If the product differs by more than the residuals and rounding explain.

    Cost: one matvec.
    """
    space, product = products.space, products(vector)
    lengths = space.norms(torch.cat([product - expected, product, expected, vector])).tolist()
    difference, *sizes, length = lengths
    size = max(*sizes, scale * length)
    if difference <= 2 * bound + products_eps(space) ** 0.5 * size:
        return
    rounded, random, own = measured_rounding(products, vector)
    explained = _ROUNDINGS * rounded * (size / own if own else 0.0)
    if random > _REPEATED * rounded or difference > 2 * bound + explained:
        raise ValueError(
            f"{name} belongs to another matrix: for a vector w of {name}, A w differs from the "
            f"product that {name} implies by {difference:.1e}, where |A w| is {sizes[0]:.1e}. "
            f"Compute {name} with this matvec, or leave it out"
        )


def measured_rounding(products: Products, row: Tensor, /) -> tuple[float, float, float]:
    """Return the rounding of a product with a unit vector, its nondeterminism, and its length.

    The products A (3 v) / 3 and A v are rounded differently, so their difference measures the
    rounding. The difference of two products A v measures the nondeterminism.

    Cost: three products, which are not counted.
    """
    space = products.space
    unit = row / space.norms(row).to(row.dtype)[:, None]
    thrice = products.uncounted(3 * unit) / 3
    once, again = products.uncounted(unit), products.uncounted(unit)
    lengths = space.norms(torch.cat([thrice - once, again - once, once]))
    rounded, random, length = lengths.tolist()
    return rounded, random, length


def asymmetry_named(
    products: Products,
    row: Tensor,
    difference: float,
    scale: float,
    /,
    *,
    eps: float,
    rtol: float,
) -> str | None:
    """Return the defect of the matvec that prevents convergence, as a sentence, or None.

    Args:
        products: Products of the run. Three more are made, uncounted, if the difference exceeds
            the rounding.
        row: Vector with which the rounding is measured, one row.
        difference: Largest difference of u'Av and v'Au in the run, for unit vectors.
        scale: Largest length of a product with a unit vector.
        eps: Relative rounding of the products.
        rtol: Relative tolerance of the run; an asymmetry below it does not matter.
    """
    # The component of a random error along one vector is a small fraction of its length.
    if difference <= max(rounding(eps, scale), 0.01 * rtol * scale):
        return None
    rounded, random, length = measured_rounding(products, row)
    if random > max(_REPEATED * rounded, rounding(eps, length), 0.1 * rtol * length):
        return (
            f"the matvec is not deterministic: two products with the same vector, of length "
            f"{length:.1e}, differ by {random:.1e}; call model.eval(), or fix the seed within the "
            "loss"
        )
    if rounded > _COARSEST * max(length, scale):
        return (
            f"the matvec is not linear: A(3v)/3 and Av differ by {rounded:.1e} for a unit vector "
            f"v, with a product of length {length:.1e}; call `check(matvec, like)` for details"
        )
    if length and difference > scale * max(_ROUNDINGS * rounded / length, rtol):
        return (
            f"the matvec is not symmetric: u'Av and v'Au differ by {difference:.1e} for unit "
            f"vectors, with products of lengths up to {scale:.1e}; call `check(matvec, like)` for "
            "details"
        )
    return None


def _not_symmetric(relative: float) -> ValueError:
    """Return the error of a matvec whose u'Av and v'Au differ, relative to its scale."""
    return ValueError(
        "the matvec is not symmetric, not linear or not deterministic: u'Av and v'Au differ by "
        f"{relative:.1e}, relative to the largest eigenvalue. Usual causes: randomness in the "
        "loss, a loader that changes between passes, a matrix that is not a Hessian, an added "
        "constant, products in low precision (take rtol=0.02 or more), finite differences of a "
        "loss with kinks. Call `check(matvec, like)` for details"
    )
