"""Whether a matvec is what the algorithms take it for, before products are spent."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor

from hessfunc.algorithms.results.check import Check
from hessfunc.options import validated
from hessfunc.spaces.of import ravel, space_of
from hessfunc.spaces.space import Space
from hessfunc.trees import Matvec, Tree

_PROBES = 2


# Finite-difference steps that are tried, each smaller than the one before.
_STEPS = 5


@validated
def check(
    matvec: Matvec,
    like: Tree,
    *,
    gradient: Callable[[Tree], Tree] | None = None,
    tolerance: float | None = None,
    seed: int = 0,
) -> Check:
    """Check that a matvec is deterministic, linear and symmetric, on random vectors.

    Args:
        matvec: block -> block.
        like: a tree that says what vectors look like; with ``gradient``, the parameters at which
            the matvec was made.
        gradient: params -> tree, such as ``torch.func.grad(loss)`` with the batch held. Products
            are compared with (g(params + t v) - g(params - t v)) / 2t as well.
        tolerance: relative; by default 1e-3 in float32, 1e-6 in float64, and 8 roundings in a
            narrower dtype.
        seed: of the vectors.

    Returns:
        `Check`: true where nothing is found to be wrong; ``problems`` says what is, and what
        usually causes it. ``consistent`` is None where differences decide nothing. Errors are
        relative to the length of a whole product: one entry of the matrix that is off by 1 % is
        mostly below what float32 resolves, which ``resolution`` says.

    Raises:
        FloatingPointError: a product is not finite.

    Cost: 8 matvecs in 4 passes, and 22 gradients where ``gradient`` is given.
    """
    space = space_of(like)
    if tolerance is None:
        rounding = torch.finfo(space.dtype).eps
        tolerance = 1e-6 if space.dtype == torch.float64 else max(1e-3, 8 * rounding)
    x = space.probes(range(_PROBES), kind="normal", seed=seed)
    y = space.probes(range(_PROBES, 2 * _PROBES), kind="normal", seed=seed)

    def product(rows: Tensor) -> Tensor:
        found = space.ravel(matvec(space.unravel(rows)))
        if not torch.isfinite(found).all():
            raise FloatingPointError("a product has entries that are NaN or infinite")
        return found

    ax, again, ay, mixed = product(x), product(x), product(y), product(2 * x - 3 * y)
    size = float(torch.cat([ax, ay]).norm(dim=1).max()) or 1.0
    nondeterminism = float((ax - again).norm(dim=1).max()) / size
    nonlinearity = float((mixed - 2 * ax + 3 * ay).norm(dim=1).max()) / size
    difference = space.gram(y, ax) - space.gram(x, ay).mT
    asymmetry = float(difference.abs().max()) / (size * float(x.norm(dim=1).max()))
    problems = []
    inconsistency = resolution = None
    if gradient is not None:
        change = _change_of_gradient(space, gradient, like)
        if not change <= tolerance:
            problems.append(
                f"the gradient is random: at the same params it differs by {change:.1e}, so that "
                "products cannot be compared with it. Usual causes: dropout, noise that the loss "
                "draws, a loader that shuffles. Fix the seed within the loss"
            )
        else:
            inconsistency, resolution = (
                value / size for value in _compared(space, gradient, like, x, ax)
            )
    if not nondeterminism <= tolerance:
        problems.append(
            f"not deterministic: two equal products differ by {nondeterminism:.1e}. Usual causes: "
            "dropout whose mask is redrawn, a loader that shuffles or augments, nondeterministic "
            "kernels"
        )
    if not nonlinearity <= tolerance:
        problems.append(
            f"not linear: A(2x - 3y) is off by {nonlinearity:.1e}. Usual causes: the function is "
            "no product but the gradient at the vector, an added constant, finite differences "
            "with too large a step or across kinks, a model that computes in low precision"
        )
    if not asymmetry <= tolerance:
        problems.append(
            f"not symmetric: y'Ax and x'Ay differ by {asymmetry:.1e}. Usual causes: a Jacobian "
            "where a Hessian was meant, a mask that is redrawn, a detached part of the loss"
        )
    notes = []
    consistent = None if inconsistency is None else inconsistency <= tolerance
    if consistent is False and inconsistency is not None and resolution is not None:
        if resolution > inconsistency / 3:
            consistent = None
            notes.append(
                "undecided whether it is the derivative of the gradient: finite differences are "
                f"off by {inconsistency:.1e}, and change by {resolution:.1e} with their step. "
                "Either the loss has kinks (ReLU, max-pooling, absolute values), where the "
                "gradient jumps and differences mean nothing, while the product is that of the "
                "smooth pieces; or rounding hides what is smaller: check in float64, where "
                "smaller steps miss the kinks"
            )
        else:
            problems.append(
                "not the derivative of the gradient: finite differences are off by "
                f"{inconsistency:.1e}, at every step. Usual causes: another batch, other "
                "parameters or another training mode than the gradient's; another scale; a "
                "detached part of the loss; a custom backward whose own derivative is wrong"
            )
    return Check(
        nondeterminism=nondeterminism,
        nonlinearity=nonlinearity,
        asymmetry=asymmetry,
        inconsistency=inconsistency,
        resolution=resolution,
        consistent=consistent,
        tolerance=tolerance,
        problems=tuple(problems),
        notes=tuple(notes),
    )


def _change_of_gradient(space: Space, gradient: Callable[[Tree], Tree], params: Tree) -> float:
    """How much two evaluations of the gradient differ, relative to its length."""
    first, second = (ravel(gradient(params)) for _ in range(2))
    return float((first - second).norm()) / (float(first.norm()) or 1.0)


def _compared(
    space: Space, gradient: Callable[[Tree], Tree], params: Tree, rows: Tensor, images: Tensor
) -> tuple[float, float]:
    """How far the products are from differences of the gradient, and these from one another.

    A kink that lies between the two points adds its jump over the step. Smaller steps cross fewer
    kinks; where the differences go on changing with the step, kinks or rounding are what is seen.
    """
    point = ravel(params)
    first = torch.finfo(space.dtype).eps ** (1 / 3) * (float(point.norm()) or 1.0)
    shrink = 0.1 if space.dtype == torch.float64 else 0.4

    def difference(step: float) -> Tensor:
        found = []
        for row in rows:
            move = step / float(row.norm()) * row
            ahead, behind = (
                ravel(gradient(space.unravel(point + sign * move))) for sign in (1, -1)
            )
            found.append((ahead - behind) * (float(row.norm()) / (2 * step)))
        return torch.stack(found)

    tried = [difference(first * shrink**i) for i in range(_STEPS)]
    errors = [float((found - images).norm(dim=1).max()) for found in tried]
    changes = [float((a - b).norm(dim=1).max()) for a, b in pairwise(tried)]
    return min(errors), min(changes)
