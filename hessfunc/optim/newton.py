"""Newton's method with one equation for each parameter tensor, as pure functions."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from hessfunc.optim.solvers import Direction, Solver, conjugate_gradients
from hessfunc.options import validated


@dataclass(frozen=True)
class NewtonState:
    """State of Newton's method between two steps.

    Attributes:
        step: Number of steps so far.
        matvecs: Number of products so far, each with the block of one parameter tensor.
        unconverged: Names of the parameters whose last equation did not reach the tolerance.
        negative_curvature: Names of the parameters whose last matrix was not positive definite.
    """

    step: int = 0
    matvecs: int = 0
    unconverged: tuple[str, ...] = ()
    negative_curvature: tuple[str, ...] = ()


@dataclass(frozen=True)
class Newton:
    """Optimiser as a pair of pure functions.

    Attributes:
        init: Function ``params -> state``.
        update: Function ``(gradients, state, params, matvecs) -> (params, state)``.
    """

    init: Callable[[Mapping[str, Tensor]], NewtonState]
    update: Callable[
        [Mapping[str, Tensor], NewtonState, Mapping[str, Tensor], Mapping[str, Any]],
        tuple[dict[str, Tensor], NewtonState],
    ]


@validated
def newton(*, lr: float = 0.1, alpha: float = 0.02, solve: Solver | None = None) -> Newton:
    """Newton's method with one equation for each parameter tensor.

        [(1 - alpha) H + alpha I] d = -g,    theta <- theta + lr d

    Here g is the gradient and H the diagonal block of the curvature for this tensor. With
    alpha = 1 the method is gradient descent and needs no products.

    Args:
        lr: Learning rate.
        alpha: Weight of the identity in the damped curvature, in [0, 1].
        solve: Solver of one equation, `conjugate_gradients` or `direct`. The default is
            `conjugate_gradients`.

    Returns:
        A `Newton`. Its ``update`` takes flat dicts of gradients and parameters, and a mapping of
        the curvature. For each name this holds a matvec of the tensor (``[k, *shape]`` to
        ``[k, *shape]``) or a block with such a ``matvec``, as `exact_blocks`, `hbp` and `kfac`
        return them. Blocks are looked up one after another, and none is kept.

    Raises:
        ValueError: If an option is out of range. ``update`` raises it if a gradient is not finite
            or does not have the shape of its parameter.
        KeyError: If a parameter has no gradient or no matvec. Raised by ``update``.

    Source: Martens 2010, Deep learning via Hessian-free optimization; Chen, Chou and Chang 2018,
    arXiv 1802.06502; Dangel, Harmeling and Hennig 2019, arXiv 1902.01813.
    """
    # Schedules may start or end at a learning rate of zero.
    if not (lr >= 0 and math.isfinite(lr)):
        raise ValueError(f"lr={lr}: the learning rate must be finite and not negative")
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha={alpha}: alpha must be in [0, 1]")
    solver = conjugate_gradients() if solve is None else solve

    def init(params: Mapping[str, Tensor], /) -> NewtonState:
        return NewtonState()

    def update(
        gradients: Mapping[str, Tensor],
        state: NewtonState,
        params: Mapping[str, Tensor],
        matvecs: Mapping[str, Any],
        /,
    ) -> tuple[dict[str, Tensor], NewtonState]:
        _refuse_missing(params, gradients, "gradient")
        _refuse_missing(params, matvecs, "matvec")
        for name, parameter in params.items():
            _refuse_gradient(name, parameter, gradients[name])
        directions = {
            name: Direction(-gradients[name])
            if alpha == 1
            # No name refers to the block, so that its graph is freed before the next is built.
            else solver(matvecs[name], -gradients[name], alpha)
            for name in params
        }
        moved = {
            name: parameter + lr * directions[name].value for name, parameter in params.items()
        }
        return moved, NewtonState(
            step=state.step + 1,
            matvecs=state.matvecs + sum(d.matvecs for d in directions.values()),
            unconverged=tuple(n for n, d in directions.items() if not d.converged),
            negative_curvature=tuple(n for n, d in directions.items() if d.negative_curvature),
        )

    return Newton(init, update)


def _refuse_missing(params: Mapping[str, Tensor], given: Mapping[str, Any], what: str) -> None:
    present = set(given)
    if missing := [name for name in params if name not in present]:
        raise KeyError(f"no {what} for the parameters {', '.join(missing)}: pass one for each")


def _refuse_gradient(name: str, parameter: Tensor, gradient: Tensor) -> None:
    if gradient.shape != parameter.shape:
        raise ValueError(
            f"the gradient of {name!r} has shape {tuple(gradient.shape)}, but the parameter has "
            f"shape {tuple(parameter.shape)}"
        )
    if not bool(gradient.isfinite().all()):
        raise ValueError(
            f"the gradient of {name!r} has entries that are NaN or infinite: decrease lr or "
            "increase alpha"
        )
