"""The edge of stability."""

from __future__ import annotations

from typing import Any

import torch

__all__ = ["adam_stability", "edges", "stability"]


def stability(lr: float, /, *, momentum: float = 0.0) -> float:
    """The curvature above which gradient descent on a quadratic diverges, (2 + 2 momentum) / lr."""
    return (2 + 2 * momentum) / lr


def adam_stability(lr: float, /, *, beta_1: float = 0.9) -> float:
    """Largest stable preconditioned sharpness of Adam, (2 + 2 beta_1) / ((1 - beta_1) lr).

    Source: Cohen et al. 2022, arXiv 2207.14484.
    """
    return (2 + 2 * beta_1) / ((1 - beta_1) * lr)


def edges(
    optimizer: torch.optim.Optimizer | None, /, lr: float | None = None
) -> tuple[float | None, float | None]:
    """The curvatures above which the steps of an optimiser diverge on a quadratic.

    Gradient descent with momentum b, dampening d and the decay w of weights is stable up to

        (2 + 2 b) / ((1 - d) lr) - w,

    and with Nesterov's momentum up to ``(2 + 2 b) / ((1 + 2 b) lr) - w``.

    Args:
        optimizer: Optimiser of torch, or None where it is not known.
        lr: Learning rate, by default that of the optimiser.

    Returns:
        The edge of the largest eigenvalue, which SGD has, and that of the preconditioned sharpness,
        which Adam and AdamW have. None where there is none: for another optimiser, for groups of
        parameters with other options, and for a step size of 0.
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
    # Without momentum torch has no use for the others.
    dampening = float(group["dampening"]) if momentum else 0.0
    per_step = 1 + 2 * momentum if momentum and group["nesterov"] else 1 - dampening
    if not per_step > 0:
        return None
    return stability(lr * per_step, momentum=momentum) - float(group["weight_decay"])


def _of_adam(group: dict[str, Any], lr: float) -> float | None:
    # Decay that is not decoupled is a part of the gradient, so of another matrix.
    coupled = group["weight_decay"] and not group.get("decoupled_weight_decay", False)
    if group["maximize"] or coupled:
        return None
    return adam_stability(lr, beta_1=float(group["betas"][0]))


def _common(found: list[float | None]) -> float | None:
    return found[0] if len(set(found)) == 1 else None
