"""Stability limits of optimisers, and the preconditioner of Adam."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from hessfunc.options import at_least, validated


@validated
def adam_diagonal(optimizer: torch.optim.Optimizer, model: nn.Module, /) -> dict[str, Tensor]:
    """Return the diagonal P by which Adam divides its steps, a tree like ``functional(model)[1]``.

        P = (1 - beta_1^t) (sqrt(v / (1 - beta_2^t)) + eps)

    Training with Adam is stable while the largest eigenvalue of P^-1/2 H P^-1/2 is below
    (2 + 2 beta_1) / ((1 - beta_1) lr), which is 38 / lr for beta_1 = 0.9. The products with this
    matrix are ``precondition(matvec, adam_diagonal(optimizer, model))``.

    Args:
        optimizer: Adam or AdamW optimiser of PyTorch, after at least one step.
        model: Module whose parameters the optimiser trains.

    Raises:
        TypeError: If the optimiser is neither Adam nor AdamW.
        ValueError: If a trainable parameter has no second moment in the optimiser's state.

    Source: Cohen et al. 2022, arXiv 2207.14484.
    """
    if not isinstance(optimizer, torch.optim.Adam):
        raise TypeError(
            f"{type(optimizer).__name__} has no known preconditioner: pass an Adam or AdamW"
        )
    options = {p: group for group in optimizer.param_groups for p in group["params"]}
    diagonal: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        state = optimizer.state.get(parameter, {})
        if "exp_avg_sq" not in state:
            raise ValueError(
                f"the optimiser has no second moment of {name!r}: pass an Adam that trains this "
                "model, after its first step"
            )
        group, t = options[parameter], float(state["step"])
        first, second = group["betas"]
        moment = state.get("max_exp_avg_sq", state["exp_avg_sq"])
        corrected = moment.detach() / (1 - second**t)
        diagonal[name] = (1 - first**t) * (corrected.sqrt() + group["eps"])
    return diagonal


@validated
def stability(lr: float, /, *, momentum: float = 0.0) -> float:
    """Return the curvature above which gradient descent on a quadratic diverges.

    The value is (2 + 2 momentum) / lr.

    Raises:
        ValueError: If the learning rate is not positive, or if the momentum is negative.
    """
    _refuse_rate(lr)
    at_least(0, momentum=momentum)
    return (2 + 2 * momentum) / lr


@validated
def adam_stability(lr: float, /, *, beta_1: float = 0.9) -> float:
    """Return the largest stable preconditioned sharpness of Adam.

    The value is (2 + 2 beta_1) / ((1 - beta_1) lr).

    Raises:
        ValueError: If the learning rate is not positive, or if ``beta_1`` is not in [0, 1).

    Source: Cohen et al. 2022, arXiv 2207.14484.
    """
    _refuse_rate(lr)
    if not 0 <= beta_1 < 1:
        raise ValueError(f"beta_1={beta_1}: it must be in [0, 1), such as beta_1=0.9")
    return (2 + 2 * beta_1) / ((1 - beta_1) * lr)


def _refuse_rate(lr: float) -> None:
    if not lr > 0:
        raise ValueError(f"lr={lr}: it must be positive, such as lr=0.1")


def edges(
    optimizer: torch.optim.Optimizer | None, /, lr: float | None = None
) -> tuple[float | None, float | None]:
    """Return the curvatures above which the steps of an optimiser diverge on a quadratic.

    Gradient descent with momentum b, dampening d and weight decay w is stable up to

        (2 + 2 b) / ((1 - d) lr) - w,

    and with Nesterov momentum up to ``(2 + 2 b) / ((1 + 2 b) lr) - w``.

    Args:
        optimizer: Optimiser of PyTorch, or None if it is unknown.
        lr: Learning rate. By default the learning rate of the optimiser.

    Returns:
        The edge for the largest eigenvalue (of SGD), and the edge for the preconditioned sharpness
        (of Adam and AdamW). Each is None for another optimiser, for parameter groups with different
        edges, and for a step size of 0.
    """
    if optimizer is None:
        return None, None
    rates = {float(group["lr"]) for group in optimizer.param_groups}
    if len(rates) > 1:
        return None, None
    rate = rates.pop() if lr is None else lr
    if not rate > 0:
        return None, None
    match optimizer:
        case torch.optim.SGD():
            return _common([_of_sgd(group, rate) for group in optimizer.param_groups]), None
        case torch.optim.Adam():
            return None, _common([_of_adam(group, rate) for group in optimizer.param_groups])
        case _:
            return None, None


def _of_sgd(group: dict[str, Any], lr: float) -> float | None:
    if group["maximize"]:
        return None
    momentum = float(group["momentum"])
    # Without momentum, torch ignores dampening and Nesterov.
    dampening = float(group["dampening"]) if momentum else 0.0
    per_step = 1 + 2 * momentum if momentum and group["nesterov"] else 1 - dampening
    if not per_step > 0:
        return None
    return stability(lr * per_step, momentum=momentum) - float(group["weight_decay"])


def _of_adam(group: dict[str, Any], lr: float) -> float | None:
    # Coupled weight decay is a part of the gradient, so that the matrix is H + w I instead of H.
    coupled = group["weight_decay"] and not group.get("decoupled_weight_decay", False)
    if group["maximize"] or coupled:
        return None
    return adam_stability(lr, beta_1=float(group["betas"][0]))


def _common(edges: list[float | None]) -> float | None:
    return edges[0] if len(set(edges)) == 1 else None
