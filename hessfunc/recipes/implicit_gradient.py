"""Gradients with respect to hyperparameters, by the implicit function theorem."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable
from typing import Any, TypeAlias, Unpack

import torch
from torch import Tensor

from hessfunc.algorithms.driver import RunOptions
from hessfunc.algorithms.results import ImplicitGradient, Solution
from hessfunc.algorithms.solve.cg import cg
from hessfunc.autograd import differentiable_twice
from hessfunc.losses import LossFunction
from hessfunc.options import at_least, validated
from hessfunc.spaces.of import inner as inner_product
from hessfunc.spaces.of import space_of
from hessfunc.transforms.batches.gradient import mean_gradient
from hessfunc.transforms.batches.mean import over_batches, refuse_one_batch
from hessfunc.transforms.batches.reductions import Average
from hessfunc.transforms.batches.sums import Keep
from hessfunc.transforms.evaluation import scalar
from hessfunc.transforms.hessian import hvp
from hessfunc.transforms.matvecs.arithmetic import apply, shift
from hessfunc.trees import Matvec, Tree, tree_map

# Function (params, hyperparams, batch) -> scalar.
BilevelLoss: TypeAlias = Callable[[Tree, Tree, Any], Tensor]
# Relative residual of the correction, whose size estimates the error.
_CORRECTED = 0.1


class NotStationaryWarning(UserWarning):
    """Warning that the inner loss is not stationary at the parameters."""


@validated
def implicit_gradient(
    outer: BilevelLoss,
    inner: BilevelLoss,
    params: Tree,
    hyperparams: Tree,
    /,
    *,
    outer_batches: Iterable[Any],
    inner_batches: Iterable[Any],
    solve: Callable[..., Solution] = cg,
    damping: float = 0.0,
    preconditioner: Matvec | None = None,
    start: Tree | None = None,
    rtol: float = 1e-5,
    atol: float = 0.0,
    max_matvecs: int = 1000,
    weight: Callable[[Any], float] | None = None,
    keep: Keep = False,
    stationarity: float = 1e-3,
    **run: Unpack[RunOptions],
) -> ImplicitGradient:
    """Differentiate an outer loss at the minimum of an inner loss, without unrolling its training.

        d outer(theta(lambda), lambda) / d lambda
            = d_lambda outer - d_lambda <grad_theta inner(theta, lambda), q>,
        (H + damping I) q = grad_theta outer,  H = Hessian of inner with respect to theta

    Here theta are the parameters, a minimum of the inner loss, lambda the hyperparameters, and q
    is held fixed. The losses are means over their batches. The formula follows from the implicit
    function theorem, which needs a stationary point of the inner loss and an invertible H.

    The error of the solve is measured. A second solve for the residual of q to 10 % corrects q,
    and the correction of the gradient is the estimate of the error.

    Args:
        outer: Function ``(params, hyperparams, batch) -> scalar``, such as the validation loss.
        inner: Function ``(params, hyperparams, batch) -> scalar``, such as the penalised training
            loss.
        params: Parameters theta at a minimum of the inner loss.
        hyperparams: Hyperparameters lambda, any tree of tensors.
        outer_batches: Any re-iterable of batches of the outer loss.
        inner_batches: Any re-iterable of batches of the inner loss.
        solve: `cg`, or `minres` if H is indefinite.
        damping: Number that is added to the diagonal of H. It makes a singular H invertible, and
            biases the gradient.
        preconditioner: Function from a block of vectors to the block of their products with M, a
            symmetric positive definite matrix close to the inverse of H + damping I.
        start: Start vector of the solve, a tree like ``params``, such as the ``adjoint`` of the
            last call.
        rtol: Relative tolerance: the solve stops at a residual of at most
            max(rtol |grad outer|, atol).
        atol: Absolute tolerance of the residual.
        max_matvecs: Budget, the largest number of Hessian products, at least 2.
        weight: Weight of a batch in both means, as in `over_batches`.
        keep: Whether the graphs of all inner batches are kept during the solve.
        stationarity: Largest ``|q| |grad inner|``, relative to the outer loss, without a warning.
        **run: Seed, callback, progress and checkpoint of the solve, as in `RunOptions`. The
            callback receives the running `Solution`.

    Warns:
        NotStationaryWarning: If ``|q| |grad inner|``, a bound of the first-order change of the
            outer loss on the way to the minimum, exceeds ``stationarity`` times the outer loss.

    Raises:
        ValueError: If an option is out of range, or if the inner loss does not depend on the
            hyperparameters. Also as in `over_batches`, `hvp` and `cg`.

    Cost: one gradient of the outer loss, one of the inner loss, and its second derivatives along q
    and the correction, besides the Hessian products, which dominate. Memory: 26 vectors with `cg`
    and 33 with `minres`, besides the graph of a batch.

    Source: Pedregosa 2016, arXiv 1602.02355; Lorraine, Vicol and Duvenaud 2020, arXiv 1911.02590.
    """
    at_least(0, stationarity=stationarity)
    at_least(2, max_matvecs=max_matvecs)
    for batches in (outer_batches, inner_batches):
        refuse_one_batch(batches)
    hyperparams = tree_map(Tensor.detach, hyperparams)
    of_outer = Average.over(weight, outer_batches)
    of_inner = Average.over(weight, inner_batches)
    value, (outer_gradient, direct) = mean_gradient(
        lambda pair, batch: outer(pair[0], pair[1], batch),
        of_outer,
        (params, hyperparams),
        outer_batches,
    )

    def fixed(point: Tree, batch: Any) -> Tensor:
        return inner(point, hyperparams, batch)

    _, inner_gradient = mean_gradient(fixed, of_inner, params, inner_batches)
    hessian = over_batches(hvp(fixed), weight=weight, keep=keep)(params, inner_batches)

    def solved(b: Tree, *, rtol: float, budget: int, **more: Any) -> Solution:
        return solve(
            hessian,
            b,
            damping=damping,
            preconditioner=preconditioner,
            rtol=rtol,
            max_matvecs=budget,
            **more,
        )

    def crossed(q: Tree) -> Tree:
        """Return d_lambda <grad_theta inner, q>."""
        along = _along(inner, params, q)
        return mean_gradient(along, of_inner, hyperparams, inner_batches, name="hyperparams")[1]

    # A product is reserved for the residual.
    first = solved(outer_gradient, rtol=rtol, budget=max_matvecs - 1, atol=atol, start=start, **run)
    image = apply(shift(hessian, damping), first.x)
    residual = tree_map(torch.sub, outer_gradient, image)
    adjoint, length, error = first.x, _norm(residual), math.inf
    gradient = tree_map(torch.sub, direct, crossed(adjoint))
    matvecs, passes = first.matvecs + 1, first.passes + 1
    if length == 0:
        error = 0.0
    elif first.converged and matvecs < max_matvecs:
        left = max_matvecs - matvecs
        second = solved(residual, rtol=_CORRECTED, budget=left, space=run.get("space"))
        matvecs, passes = matvecs + second.matvecs, passes + second.passes
        if second.converged:
            change = crossed(second.x)
            adjoint = tree_map(torch.add, adjoint, second.x)
            gradient = tree_map(torch.sub, gradient, change)
            length, error = second.residual, _norm(change)
    slope = _norm(inner_gradient)
    outer_change = -float(inner_product(adjoint, inner_gradient))
    if slope * _norm(adjoint) > stationarity * abs(value):
        warnings.warn(
            f"params is not a stationary point of the inner loss, whose gradient has norm "
            f"{slope:.1e}: at the minimum, the outer loss would differ from {value:.3g} by about "
            f"{outer_change:.1e}, and its gradient by an unknown amount. Train longer, or raise "
            "`stationarity`",
            NotStationaryWarning,
            stacklevel=3,
        )
    return ImplicitGradient(
        gradient=gradient,
        direct=direct,
        value=value,
        adjoint=adjoint,
        residual=length,
        converged=first.converged,
        error=error,
        inner_gradient=slope,
        outer_change=outer_change,
        matvecs=matvecs,
        passes=passes,
        reason=first.reason,
        seed=first.seed,
    )


def _along(loss: BilevelLoss, params: Tree, q: Tree) -> LossFunction:
    """Return ``<grad_theta loss, q>`` as a function of the hyperparameters and a batch."""
    space = space_of(params)
    point = [leaf.detach().requires_grad_() for leaf in space.tree_leaves(params)]

    def along(hyperparams: Tree, batch: Any) -> Tensor:
        with differentiable_twice(space.device):
            value = scalar(loss(space.tree(point), hyperparams, batch))
            gradient = torch.autograd.grad(value, point, create_graph=True, materialize_grads=True)
            return inner_product(space.tree(gradient), q)

    return along


def _norm(vector: Tree) -> float:
    return math.sqrt(float(inner_product(vector, vector)))
