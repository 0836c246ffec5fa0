"""Sharpness without matrices: critical sharpness, and the preconditioner of Adam."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hessfunc import options
from hessfunc.autograd import differentiable_twice
from hessfunc.losses import LossFunction
from hessfunc.options import validated
from hessfunc.spaces.of import space_of
from hessfunc.trees import Tree


@dataclass(frozen=True)
class Sharpness:
    """Critical sharpness, with what it took to find.

    Attributes:
        value: 2 / step.
        step: the smallest step along minus the direction that raises the loss.
        bounds: the largest step tried that did not raise it, and the smallest that did.
        evaluations: forward passes that were spent.
        converged: whether the bounds are within the tolerance.
    """

    value: float
    step: float
    bounds: tuple[float, float]
    evaluations: int
    converged: bool


@options.validated(start=options.finite)
def critical_sharpness(
    loss: LossFunction, /, *, rtol: float = 0.01, start: float = 1.0, max_evaluations: int = 100
) -> Callable[[Tree, Any, Tree], Sharpness]:
    """Critical sharpness, a function ``(params, batch, direction) -> Sharpness``.

        2 / s,  s = the smallest s > 0 with loss(params - s direction) > loss(params)

    With the gradient as direction, on a quadratic, it is g'Hg / g'g, which is at most the largest
    eigenvalue. With the step of another loss (or of an optimiser) as direction it is the relative
    form: this loss's curvature along that step, d'Hd / g'd on a quadratic. Forward passes alone.

    Args:
        loss: ``(params, batch) -> scalar``.
        rtol: the relative width of the bounds at which the bisection stops.
        start: the first step that is tried. The search doubles or halves from there and then
            bisects: where the loss rises, falls and rises again, another start may find another
            of these steps.
        max_evaluations: the budget of forward passes.

    Raises:
        ValueError: (from the function) the loss is not finite at params, or the direction is zero.

    Returns:
        A function whose result is infinite where the direction is no descent direction, and zero
        where no step raises the loss.

    Source: Kalra et al. 2026, arXiv 2601.16979.
    """

    if not start > 0 or not rtol > 0 or max_evaluations < 2:
        raise ValueError(
            f"start={start}, rtol={rtol}, max_evaluations={max_evaluations}: the first two must "
            "be positive, the last at least 2"
        )

    def of(params: Tree, batch: Any, direction: Tree) -> Sharpness:
        space = space_of(params)
        point, along = space.tree_leaves(params), space.tree_leaves(direction)
        if not any(bool(leaf.any()) for leaf in along):
            raise ValueError("the direction is zero: there is no step along it")
        evaluations = 0

        def value_at(step: float) -> float:
            nonlocal evaluations
            evaluations += 1
            moved = (p - step * d for p, d in zip(point, along, strict=True))
            with differentiable_twice(space.device), torch.no_grad():
                return float(loss(space.tree(moved), batch))

        base = value_at(0.0)
        if not math.isfinite(base):
            raise ValueError(f"the loss is {base} at params")

        def raises(step: float) -> bool:
            # A loss that is no longer finite has certainly risen.
            return not value_at(step) <= base

        low, high, trial = 0.0, math.inf, start
        tiny, huge = start * 1e-12, start * 1e12
        while evaluations < max_evaluations and high == math.inf and trial < huge:
            if raises(trial):
                high = trial
            else:
                low, trial = trial, 2 * trial
        if high == math.inf:
            return Sharpness(0.0, math.inf, (low, math.inf), evaluations, trial >= huge)
        while low == 0.0 and evaluations < max_evaluations and high > tiny:
            # A step too small to change the loss at all says nothing: only a lower loss does.
            if value_at(high / 2) < base:
                low = high / 2
            else:
                high /= 2
        if low == 0.0:
            done = high <= tiny
            return Sharpness(math.inf if done else 2 / high, 0.0, (0.0, high), evaluations, done)
        while high - low > rtol * high and evaluations < max_evaluations:
            middle = (low + high) / 2
            low, high = (low, middle) if raises(middle) else (middle, high)
        step = (low + high) / 2
        return Sharpness(2 / step, step, (low, high), evaluations, high - low <= rtol * high)

    return of


@validated
def adam_diagonal(optimizer: torch.optim.Optimizer, model: nn.Module, /) -> dict[str, Tensor]:
    """The diagonal P by which Adam divides its steps, a tree like the params of ``functional``.

        P = (1 - beta_1^t) (sqrt(v / (1 - beta_2^t)) + eps)

    Training with Adam is stable while the largest eigenvalue of P^-1/2 H P^-1/2, that is of
    ``precondition(matvec, adam_diagonal(optimizer, model))``, stays below (2 + 2 beta_1) /
    ((1 - beta_1) lr), 38 / lr at beta_1 = 0.9.

    Args:
        optimizer: Adam or AdamW of torch, after at least one step.
        model: whose parameters it trains.

    Raises:
        TypeError: the optimiser is neither.
        ValueError: a trainable parameter has no second moment in the optimiser's state.

    Source: Cohen et al. 2022, arXiv 2207.14484.
    """
    if not isinstance(optimizer, torch.optim.Adam):
        raise TypeError(f"{type(optimizer).__name__} is not Adam or AdamW, and divides otherwise")
    options = {p: group for group in optimizer.param_groups for p in group["params"]}
    found: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        state = optimizer.state.get(parameter, {})
        if "exp_avg_sq" not in state:
            raise ValueError(
                f"the optimiser holds no second moment of {name!r}: is it an Adam of this model, "
                "and has it made a step?"
            )
        group, t = options[parameter], float(state["step"])
        first, second = group["betas"]
        moment = state.get("max_exp_avg_sq", state["exp_avg_sq"])
        corrected = moment.detach() / (1 - second**t)
        found[name] = (1 - first**t) * (corrected.sqrt() + group["eps"])
    return found
