"""Critical sharpness: curvature along a direction, from evaluations of the loss only."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from hessfunc import options
from hessfunc.algorithms.results import Sharpness
from hessfunc.autograd import differentiable_twice, rereading
from hessfunc.display import Report, Reported, reporting
from hessfunc.losses import LossFunction
from hessfunc.spaces.of import space_of
from hessfunc.spaces.space import Space
from hessfunc.trees import Tree

# Steps beyond this factor of the first step are not tried.
_FURTHEST = 1e12


@options.validated(start=options.finite, direction=options.tree)
def critical_sharpness(
    loss: LossFunction,
    params: Tree,
    batch: Any,
    direction: Tree,
    /,
    *,
    rtol: float = 0.01,
    start: float = 1.0,
    max_evaluations: int = 100,
    progress: Reported = None,
) -> Sharpness:
    """Find the critical sharpness of a loss along a direction.

        2 / s,  s = the smallest s > 0 with loss(params - s direction) > loss(params)

    With the gradient g as the direction, on a quadratic, the critical sharpness is g'Hg / g'g, at
    most the largest eigenvalue. With the step d of another loss or of an optimiser as the
    direction, it is the relative form: the curvature of this loss along that step, d'Hd / g'd on
    a quadratic. The value is infinite where the direction is not a descent direction, and zero
    where no step raises the loss.

    The search doubles or halves the first step until the loss rises, then bisects. Where the loss
    rises, falls and rises again, another first step may lead to another of these steps.

    Examples:
        >>> loss = lambda w, x: 2 * w.square().sum()  # the Hessian is 4 I
        >>> w = torch.ones(3, dtype=torch.float64)
        >>> gradient = torch.func.grad(loss)(w, torch.zeros(1))
        >>> abs(hf.critical_sharpness(loss, w, torch.zeros(1), gradient).value - 4) < 0.04
        True

    Args:
        loss: Function ``(params, batch) -> scalar``.
        params: Parameters at which the search begins.
        batch: Batch of the loss.
        direction: Tree like ``params``; steps go against it.
        rtol: Relative width of the bounds at which the bisection stops.
        start: First step.
        max_evaluations: Budget of evaluations of the loss.
        progress: Function of a `Progress`, called after each evaluation; True for a bar or lines,
            as in `RunOptions`.

    Raises:
        ValueError: If the loss is not finite at ``params``, if the direction is zero, or if an
            option is out of range.

    Cost: one evaluation of the loss a step, about 12 for rtol=0.01; no gradient.

    Source: Kalra et al. 2026, arXiv 2601.16979.
    """
    if not start > 0 or not rtol > 0 or max_evaluations < 2:
        raise ValueError(
            f"start={start}, rtol={rtol}, max_evaluations={max_evaluations}: start and rtol must "
            "be positive, and max_evaluations at least 2"
        )
    space = space_of(params)
    point, along = space.tree_leaves(params), space.tree_leaves(direction)
    if not any(bool(leaf.any()) for leaf in along):
        raise ValueError("the direction is zero: pass a gradient or a step")
    with reporting(
        progress, "critical_sharpness", total=max_evaluations, unit="evaluations"
    ) as report:
        return _search(loss, space, point, along, batch, rtol, start, max_evaluations, report)


def _search(
    loss: LossFunction,
    space: Space,
    point: Sequence[Tensor],
    along: Sequence[Tensor],
    batch: Any,
    rtol: float,
    start: float,
    max_evaluations: int,
    report: Report | None,
) -> Sharpness:
    """Double or halve the first step until the loss rises, then bisect."""
    evaluations = 0

    def value_at(step: float) -> float:
        nonlocal evaluations
        evaluations += 1
        if report is not None:
            report(evaluations)
        moved = (p - step * d for p, d in zip(point, along, strict=True))
        with rereading(batch), differentiable_twice(space.device), torch.no_grad():
            return float(loss(space.tree(moved), batch))

    def result(
        value: float, step: float, bounds: tuple[float, float], converged: bool
    ) -> Sharpness:
        budget = f"budget exhausted after {evaluations} of {max_evaluations} evaluations"
        return Sharpness(
            value=value,
            step=step,
            bounds=bounds,
            evaluations=evaluations,
            matvecs=0,
            passes=0,
            reason="converged" if converged else budget,
            seed=None,
        )

    base = value_at(0.0)
    if not math.isfinite(base):
        raise ValueError(f"the loss is {base} at params: check the parameters and the batch")

    def raises(step: float) -> bool:
        # A NaN compares false, so that a loss that is no longer finite counts as risen.
        return not value_at(step) <= base

    low, high, trial = 0.0, math.inf, start
    while evaluations < max_evaluations and high == math.inf and trial < start * _FURTHEST:
        if raises(trial):
            high = trial
        else:
            low, trial = trial, 2 * trial
    if high == math.inf:
        return result(0.0, math.inf, (low, math.inf), trial >= start * _FURTHEST)
    while low == 0.0 and evaluations < max_evaluations and high > start / _FURTHEST:
        # A step too small to change the loss gives no bound: only a lower loss is one.
        if value_at(high / 2) < base:
            low = high / 2
        else:
            high /= 2
    if low == 0.0:
        no_descent = high <= start / _FURTHEST
        return result(math.inf if no_descent else 2 / high, 0.0, (0.0, high), no_descent)
    while high - low > rtol * high and evaluations < max_evaluations:
        middle = (low + high) / 2
        low, high = (low, middle) if raises(middle) else (middle, high)
    step = (low + high) / 2
    return result(2 / step, step, (low, high), high - low <= rtol * high)
