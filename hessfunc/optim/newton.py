"""Newton's method with one equation a parameter tensor, as pure functions."""

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
    """What Newton's method remembers from step to step.

    Attributes:
        step: steps so far.
        matvecs: products so far, each with the block of one parameter tensor.
        unconverged: the parameters whose last equation was not solved within the tolerance.
        negative_curvature: the parameters whose last matrix was not positive definite.
    """

    step: int = 0
    matvecs: int = 0
    unconverged: tuple[str, ...] = ()
    negative_curvature: tuple[str, ...] = ()


@dataclass(frozen=True)
class Newton:
    """The two functions of an optimiser, both pure.

    Attributes:
        init: ``params -> state``.
        update: ``(gradients, state, params, matvecs) -> (params, state)``.
    """

    init: Callable[[Mapping[str, Tensor]], NewtonState]
    update: Callable[
        [Mapping[str, Tensor], NewtonState, Mapping[str, Tensor], Mapping[str, Any]],
        tuple[dict[str, Tensor], NewtonState],
    ]


@validated
def newton(*, lr: float = 0.1, alpha: float = 0.02, solve: Solver | None = None) -> Newton:
    """Newton's method, one equation a parameter tensor.

        [(1 - alpha) H + alpha I] d = -g,    theta <- theta + lr d

    with g the gradient and H the curvature of this tensor alone. With alpha = 1 it is gradient
    descent, at no product.

    Args:
        lr: the learning rate.
        alpha: how much of the identity is mixed into the curvature, in [0, 1].
        solve: of one equation, `conjugate_gradients` or `direct`; by default the former.

    Returns:
        `Newton`. Its ``update`` takes flat dicts of gradients and parameters, and of the curvature
        for each name a matvec of this tensor alone (``[k, *shape]`` -> the same), or a block with
        such a ``matvec``: what `exact_blocks` and the blocks of `hbp` or `kfac` are. They are
        looked up one after another, and none is kept.

    Raises:
        ValueError: an option is out of range; (from ``update``) a gradient is not finite, or not
            of its parameter's shape.
        KeyError: (from ``update``) a parameter has no gradient or no matvec.

    Source: Martens 2010, Deep learning via Hessian-free optimization; Chen, Chou and Chang 2018,
    arXiv 1802.06502; Dangel, Harmeling and Hennig 2019, arXiv 1902.01813.
    """
    # Zero is where schedules start or end.
    if not (lr >= 0 and math.isfinite(lr)):
        raise ValueError(f"lr={lr}: it must be finite, and not negative")
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha={alpha}: it must be in [0, 1]")
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
            # The block is named nowhere, so that its graph is gone before the next is made.
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
        raise KeyError(f"no {what} for the parameters {', '.join(missing)}")


def _refuse_gradient(name: str, parameter: Tensor, gradient: Tensor) -> None:
    if gradient.shape != parameter.shape:
        raise ValueError(
            f"the gradient of {name!r} has shape {tuple(gradient.shape)}, and the parameter "
            f"{tuple(parameter.shape)}"
        )
    if not bool(gradient.isfinite().all()):
        raise ValueError(
            f"the gradient of {name!r} has entries that are NaN or infinite: lower lr or raise "
            "alpha"
        )
