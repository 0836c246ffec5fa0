"""Symmetry of a matvec, as the inner products of a run show it at no cost."""

from __future__ import annotations

import torch
from torch import Tensor

from hessfunc.algorithms.products import Products
from hessfunc.numerics import rounding

# Differences of u'Av and v'Au that products in low precision may have, in units of |A|.
SYMMETRIC = 1e-3
# Differences of u'Av and v'Au that the rounding of a product explains, in units of its length.
_ROUNDINGS = 10.0
# Two products with one vector may differ by this part of their rounding.
_REPEATED = 0.1


def refuse_asymmetric(difference: Tensor, scale: float, tolerance: float, /) -> None:
    """Raise where u'Av and v'Au differ by more than a part of the largest eigenvalue.

    Args:
        difference: Differences of u'Av and v'Au for unit vectors u and v.
        scale: Largest absolute eigenvalue so far.
        tolerance: Largest difference that is let through, in units of the scale.

    Raises:
        ValueError: A difference is larger.
    """
    if difference.numel() and float(difference.abs().max()) > tolerance * scale:
        raise _not_symmetric(float(difference.abs().max() / scale))


def refuse_unless_rounding(
    products: Products, row: Tensor, difference: float, scale: float, tolerance: float, /
) -> float:
    """Raise where u'Av and v'Au differ by more than a tolerance and the rounding of products.

    The rounding is measured where the difference is larger than the tolerance, since a model in
    low precision may have parameters in float32.

    Args:
        products: Products of the run; three more are made, uncounted, beyond the tolerance.
        row: One vector, to measure the rounding.
        difference: Difference of u'Av and v'Au for unit vectors u and v.
        scale: Largest length of a product with a unit vector so far.
        tolerance: Largest difference that is let through, in units of the scale.

    Returns:
        The tolerance of the next differences, which rounding may have raised.

    Raises:
        ValueError: The difference is larger than both.
    """
    if difference <= tolerance * scale:
        return tolerance
    rounded, random, length = measured_rounding(products, row)
    explained = _ROUNDINGS * rounded * (scale / length if length else 0.0)
    if random > _REPEATED * rounded or difference > explained:
        raise _not_symmetric(difference / scale)
    return explained / scale


def measured_rounding(products: Products, row: Tensor, /) -> tuple[float, float, float]:
    """Return the rounding of a product with a unit vector, how far two differ, and their length.

    A product with 3 v is rounded at other places than that with v. Cost: three products, which are
    not counted.
    """
    space = products.space
    unit = row / space.norms(row).to(row.dtype)[:, None]
    thrice = products.uncounted(3 * unit) / 3
    once, again = products.uncounted(unit), products.uncounted(unit)
    found = space.norms(torch.cat([thrice - once, again - once, once]))
    rounded, random, length = found.tolist()
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
    """Return why a run that has not converged could not, in words, or None.

    Args:
        products: Products of the run; three more are made, uncounted, where the difference is
            beyond rounding.
        row: One vector, to measure the rounding.
        difference: Largest difference of u'Av and v'Au that was seen, for unit vectors.
        scale: Largest length of a product with a unit vector.
        eps: Relative rounding of the products.
        rtol: Relative tolerance of the run; an asymmetry below it does not matter.
    """
    # Noise along one vector is a small part of its length.
    if difference <= max(rounding(eps, scale), 0.01 * rtol * scale):
        return None
    rounded, random, length = measured_rounding(products, row)
    if random > max(_REPEATED * rounded, rounding(eps, length), 0.1 * rtol * length):
        return (
            f"the matvec is not deterministic: the same product twice differs by {random:.1e}, of "
            f"the length {length:.1e}; call model.eval(), or give the loss a seed"
        )
    if length and difference > scale * max(_ROUNDINGS * rounded / length, rtol):
        return (
            f"the matvec is not symmetric: u'Av and v'Au of unit vectors differ by "
            f"{difference:.1e}, of lengths up to {scale:.1e}; `check(matvec, like)` tells more"
        )
    return None


def _not_symmetric(relative: float) -> ValueError:
    return ValueError(
        "the matvec is not symmetric or not deterministic: u'Av and v'Au differ by "
        f"{relative:.1e} of the largest eigenvalue. Common "
        "causes: randomness in the loss, a loader that changes between passes, a matrix that "
        "is no Hessian, products in low precision (take rtol=0.02 or more), differences of a "
        "loss with kinks. `check(matvec, like)` tells more"
    )
