"""Symmetry of a matvec, as the inner products of a Lanczos run show it at no cost."""

from __future__ import annotations

from torch import Tensor

# Differences of u'Av and v'Au that products in low precision may have, in units of |A|.
SYMMETRIC = 1e-3


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
        raise ValueError(
            "the matvec is not symmetric or not deterministic: u'Av and v'Au differ by "
            f"{float(difference.abs().max() / scale):.1e} of the largest eigenvalue. Common "
            "causes: randomness in the loss, a loader that changes between passes, a matrix that "
            "is no Hessian, products in low precision (take rtol=0.02 or more), differences of a "
            "loss with kinks. `check(matvec, like)` tells more"
        )
