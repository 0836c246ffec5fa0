"""Adversarial examples: inputs that are moved to raise the loss."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import torch
from torch import Tensor

from hessfunc import options
from hessfunc.losses import LossFunction
from hessfunc.options import at_least
from hessfunc.transforms.evaluation import scalar
from hessfunc.trees import Tree

Batch: TypeAlias = tuple[Tensor, Tensor]
Bounds: TypeAlias = tuple[float, float] | None

# Function from a batch to adversarial inputs.
Attack: TypeAlias = Callable[[Batch], Tensor]


@options.validated(batch=options.pair)
def fgsm(
    loss: LossFunction,
    params: Tree,
    batch: Batch,
    /,
    *,
    eps: float = 0.005,
    bounds: Bounds = None,
) -> Tensor:
    """Move inputs by the sign of their gradient (fast gradient sign method).

        x + eps sign(grad_x loss),    clamped to the bounds

    Args:
        loss: Function ``(params, batch) -> scalar``. Its model must have been in eval mode when
            `functional` was called, so that no batch statistics mix the examples.
        params: Parameters at which the gradient is taken.
        batch: Pair ``(inputs, targets)`` whose inputs are a floating-point tensor.
        eps: Step size, in units of the inputs.
        bounds: Smallest and largest value of an input. By default the range of the given inputs.

    Returns:
        A tensor like the inputs.

    Raises:
        ValueError: If an option is out of range.
        TypeError: If the inputs are not a floating-point tensor.

    Cost: one gradient with respect to the inputs.

    Source: Goodfellow, Shlens and Szegedy 2015, arXiv 1412.6572.
    """
    return pgd(loss, params, batch, eps=eps, step_size=eps, steps=1, bounds=bounds)


@options.validated(batch=options.pair)
def pgd(
    loss: LossFunction,
    params: Tree,
    batch: Batch,
    /,
    *,
    eps: float = 0.005,
    step_size: float = 0.00125,
    steps: int = 10,
    bounds: Bounds = None,
    seed: int | None = None,
) -> Tensor:
    """Move inputs by the signs of several gradients (projected gradient descent).

        x <- x + step_size sign(grad_x loss),    clamped to eps around the inputs and to the bounds

    Args:
        loss: Function ``(params, batch) -> scalar``, as for `fgsm`.
        params: Parameters at which the gradients are taken.
        batch: Pair ``(inputs, targets)`` whose inputs are a floating-point tensor.
        eps: Largest distance that an input may move, in units of the inputs.
        step_size: Size of a step, in units of the inputs.
        steps: Number of steps.
        bounds: Smallest and largest value of an input. By default the range of the given inputs.
        seed: Seed of a random start within eps of the inputs. None starts at the inputs.

    Returns:
        A tensor like the inputs.

    Raises:
        ValueError: If an option is out of range.
        TypeError: If the inputs are not a floating-point tensor.

    Cost: ``steps`` gradients with respect to the inputs.

    Source: Madry, Makelov, Schmidt, Tsipras and Vladu 2018, arXiv 1706.06083.
    """
    at_least(0, eps=eps, step_size=step_size)
    at_least(1, steps=steps)
    inputs, targets = batch
    if not isinstance(inputs, Tensor) or not inputs.is_floating_point():
        kind = inputs.dtype if isinstance(inputs, Tensor) else type(inputs).__name__
        raise TypeError(f"inputs of {kind} have no gradient: pass a floating-point tensor")
    inputs = inputs.detach()
    low, high = _range(inputs) if bounds is None else bounds
    if not low <= high:
        raise ValueError(f"bounds={bounds}: the lower bound must not exceed the upper bound")
    moved = inputs if seed is None else (inputs + _uniform(inputs, eps, seed)).clamp(low, high)
    for _ in range(steps):
        moved = moved + step_size * _gradient(loss, params, moved, targets).sign()
        # The bounds come last, so that they hold even if the inputs themselves violate them.
        moved = moved.clamp(inputs - eps, inputs + eps).clamp(low, high)
    return moved


def partly(attack: Attack, batch: Batch, share: float, /) -> Batch:
    """Return a batch in which a share of the examples, the first ones, is adversarial.

    If the share is at most one example, the batch is returned unchanged.
    """
    inputs, targets = batch
    if share * len(targets) <= 1:
        return batch
    count = int(share * len(targets))
    moved = attack((inputs[:count], targets[:count]))
    return torch.cat([moved, inputs[count:]]), targets


def _range(inputs: Tensor) -> tuple[float, float]:
    low, high = inputs.aminmax()
    return float(low), float(high)


def _uniform(inputs: Tensor, eps: float, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.rand(inputs.shape, generator=generator, dtype=inputs.dtype, device="cpu")
    return ((2 * drawn - 1) * eps).to(inputs.device)


def _gradient(loss: LossFunction, params: Tree, inputs: Tensor, targets: Tensor) -> Tensor:
    inputs = inputs.detach().requires_grad_()
    with torch.enable_grad():
        value = scalar(loss(params, (inputs, targets)))
    if not value.requires_grad:
        raise ValueError(
            "the loss does not depend on the inputs: compute it from the batch argument, outside "
            "`torch.no_grad()`"
        )
    return torch.autograd.grad(value, inputs)[0]
