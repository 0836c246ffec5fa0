"""Check of a matvec before a run: deterministic, linear, symmetric, derivative of the gradient."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor

from hessfunc.algorithms.products import CHANGES_ITS_BLOCK
from hessfunc.algorithms.results.check import Check
from hessfunc.numerics import NonFiniteError
from hessfunc.options import of_numpy, validated
from hessfunc.spaces.of import ravel, space_of
from hessfunc.spaces.space import Space
from hessfunc.trees import Matvec, Tree

# Number of vectors in each of the two random blocks.
_PROBES = 2
# Number of finite-difference steps, each smaller than the one before.
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

    Examples:
        >>> A = torch.tensor([[2.0, 1.0], [1.0, 3.0]], dtype=torch.float64)
        >>> print(hf.check(hf.dense(A), torch.zeros(2, dtype=torch.float64), seed=0))
        linear, symmetric and deterministic

    Args:
        matvec: Function from a block of vectors to the block of their products.
        like: Tree that shows the structure of a vector. With ``gradient``, the parameters at which
            the matvec was made.
        gradient: Function from parameters to the gradient g, such as ``torch.func.grad(loss)`` with
            a fixed batch. If given, products with v are also compared with the finite differences
            (g(params + t v) - g(params - t v)) / 2t.
        tolerance: Largest accepted difference, relative to the length of a product. By default
            1e-3 in float32, 1e-6 in float64, and 8 roundings in a narrower dtype.
        seed: Seed of the random vectors.

    Returns:
        `Check`, which is true if there is no problem. Its ``problems`` describe each problem and
        its usual causes. ``consistent`` is None if the finite differences are not accurate enough
        to decide. Errors are relative to the length of a whole product, so an error of 1 % in a
        single entry of the matrix is usually too small for float32; see ``resolution``.

    Raises:
        FloatingPointError: If a product is not finite.

    Cost: 8 matvecs in 4 passes, and 22 gradients if ``gradient`` is given.
    """
    space = space_of(like)
    if tolerance is None:
        rounding = torch.finfo(space.dtype).eps
        tolerance = 1e-6 if space.dtype == torch.float64 else max(1e-3, 8 * rounding)
    x = space.probes(range(_PROBES), kind="normal", seed=seed)
    y = space.probes(range(_PROBES, 2 * _PROBES), kind="normal", seed=seed)

    def product(rows: Tensor) -> Tensor:
        before = rows.clone()
        try:
            images = space.ravel(matvec(space.unravel(rows)))
        except TypeError as error:
            if (clearer := of_numpy(error)) is not None:
                raise clearer from error
            raise
        if not torch.equal(rows, before):
            raise ValueError(CHANGES_ITS_BLOCK)
        if not torch.isfinite(images).all():
            raise NonFiniteError(
                "a product has entries that are NaN or infinite: check that the loss and its "
                "gradient are finite at these parameters"
            )
        return images

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
                f"the gradient is random: two evaluations at the same params differ by "
                f"{change:.1e}, so finite differences of it are no reference for products. Usual "
                "causes: dropout, noise drawn in the loss, a loader that shuffles. Call "
                "model.eval(), or fix the seed within the loss"
            )
        else:
            inconsistency, resolution = (
                value / size for value in _compared(space, gradient, like, x, ax)
            )
    if not nondeterminism <= tolerance:
        problems.append(
            f"not deterministic: two products with the same vector differ by {nondeterminism:.1e}. "
            "Usual causes: dropout with a new mask at each call, a loader that shuffles or "
            "augments, nondeterministic kernels"
        )
    if not nonlinearity <= tolerance:
        problems.append(
            f"not linear: A(2x - 3y) and 2Ax - 3Ay differ by {nonlinearity:.1e}. Usual causes: a "
            "function that returns the gradient at the vector instead of a product with it, an "
            "added constant, finite differences with too large a step or across kinks, a model "
            "that computes in low precision"
        )
    if not asymmetry <= tolerance:
        problems.append(
            f"not symmetric: y'Ax and x'Ay differ by {asymmetry:.1e}. Usual causes: a Jacobian "
            "instead of a Hessian, a dropout mask that changes between calls, a detached part of "
            "the loss"
        )
    notes = []
    consistent = None if inconsistency is None else inconsistency <= tolerance
    if consistent is False and inconsistency is not None and resolution is not None:
        if resolution > inconsistency / 3:
            consistent = None
            notes.append(
                "undecided whether the product is the derivative of the gradient: it differs from "
                f"finite differences by {inconsistency:.1e}, and these change by {resolution:.1e} "
                "with their step. Either the loss has kinks (ReLU, max-pooling, absolute values), "
                "where the gradient jumps and finite differences are meaningless while the product "
                "is that of the smooth pieces, or rounding hides the difference. Check in float64, "
                "where smaller steps miss the kinks"
            )
        else:
            problems.append(
                "not the derivative of the gradient: products differ from finite differences by "
                f"{inconsistency:.1e}, at every step. Usual causes: the matvec and the gradient "
                "use different batches, parameters, training modes or scales; a detached part of "
                "the loss; a custom backward with a wrong derivative"
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
    """Return the difference of two evaluations of the gradient, relative to its length."""
    first, second = (ravel(gradient(params)) for _ in range(2))
    return float((first - second).norm()) / (float(first.norm()) or 1.0)


def _compared(
    space: Space, gradient: Callable[[Tree], Tree], params: Tree, rows: Tensor, images: Tensor
) -> tuple[float, float]:
    """Return the error of products against finite differences, and the change of these.

    A kink between the two points adds its jump divided by the step. Smaller steps cross fewer
    kinks. If the finite differences change from step to step, they show kinks or rounding.

    Returns:
        Smallest error over all steps, and smallest change between two consecutive steps.
    """
    point = ravel(params)
    # The step eps^(1/3) balances the truncation error t^2 and the rounding error eps / t.
    first = torch.finfo(space.dtype).eps ** (1 / 3) * (float(point.norm()) or 1.0)
    shrink = 0.1 if space.dtype == torch.float64 else 0.4

    def difference(step: float) -> Tensor:
        products = []
        for row in rows:
            move = step / float(row.norm()) * row
            ahead, behind = (
                ravel(gradient(space.unravel(point + sign * move))) for sign in (1, -1)
            )
            products.append((ahead - behind) * (float(row.norm()) / (2 * step)))
        return torch.stack(products)

    differences = [difference(first * shrink**i) for i in range(_STEPS)]
    errors = [float((each - images).norm(dim=1).max()) for each in differences]
    changes = [float((a - b).norm(dim=1).max()) for a, b in pairwise(differences)]
    return min(errors), min(changes)
