"""Matrices on the logits of a linear layer, as matrices on its hidden states, weight and bias.

With u = h W' + b, tangents (a, B, c) of hidden states h, weight W and bias b move u by
t = a W' + h B' + c. A product M t becomes ((M t) W, (M t)' h, sum_n (M t)_n). The logits exist only
for a few rows at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TypeAlias

import torch
from torch import Tensor

from hessfunc.autograd.linear_cross_entropy import Parts, Tokens, counted
from hessfunc.autograd.logits import RowProduct, Rows
from hessfunc.linear_head import LinearHeadLoss, OfStates, States
from hessfunc.losses import Loss
from hessfunc.randomness import uniforms
from hessfunc.transforms.likelihoods import classes_at
from hessfunc.transforms.output_gradients import INDEPENDENT

Product: TypeAlias = Callable[[list[Tensor]], list[Tensor]]


# Indices of the states that depend on the parameters, and the product of a matrix on them.
OnStates: TypeAlias = tuple[list[int], Product]


def without_logits(loss: Loss, /) -> Loss:
    """Return a loss whose outputs are hidden states and head, if it has a linear head."""
    return loss.by_states() if isinstance(loss, LinearHeadLoss) else loss


def gauss_newton(criterion: OfStates, states: States, targets: Tensor, /) -> OnStates:
    """Return the moving states, and the product with the Hessian of the logits."""
    return _of_rows(criterion, states, targets, lambda chunk, rows: rows.gauss_newton())


def sampled_fisher(
    criterion: OfStates, states: States, targets: Tensor, /, *, samples: int, key: tuple[int, ...]
) -> OnStates:
    """Return the product with a Monte Carlo Fisher matrix of the logits, as `fvp` defines it."""
    draws = uniforms(samples * targets.numel(), *key, device=targets.device).view(-1, samples)

    def matrix(chunk: slice, rows: Rows) -> RowProduct:
        return rows.sampled(classes_at(rows.probabilities, draws[chunk]))

    return _of_rows(criterion, states, targets, matrix)


def empirical_fisher(criterion: OfStates, states: States, targets: Tensor, /) -> OnStates:
    """Return the product with ``sum_b c_b r_b r_b'`` over examples b, the first axis of the states.

    r_b is the gradient with respect to the logits of example b, and c_b is the weight that
    `example_weights` describes.
    """
    tokens, moving = _tokens(criterion, states, targets)
    weights = tokens.head.weights(tokens.targets)
    count, width = len(targets), targets[0].numel()
    example = torch.arange(count, device=targets.device).repeat_interleave(width)
    share = weights.view(count, width).sum(1)
    is_mean = tokens.head.reduction == "mean"
    scale = torch.where(share > 0, 1 / share, 0.0) if is_mean else torch.ones_like(share)

    def product(tangents: list[Tensor]) -> list[Tensor]:
        parts = _parts(tokens, moving, tangents)
        along = scale.new_zeros(count)
        for chunk, rows in tokens.chunks():
            inner = (rows.gradient() * tokens.pushed(parts, chunk)).sum(1)
            along = along.index_add(0, example[chunk], inner.to(along.dtype))
        factor = (scale * along)[example]

        def cotangents() -> Iterator[tuple[slice, Tensor]]:
            for chunk, rows in tokens.chunks():
                gradient = rows.gradient()
                yield chunk, factor[chunk, None].to(gradient.dtype) * gradient

        return _chosen(tokens.pulled(cotangents(), _needed(moving)), moving, tangents)

    return moving, product


def _of_rows(
    criterion: OfStates,
    states: States,
    targets: Tensor,
    matrix: Callable[[slice, Rows], RowProduct],
) -> OnStates:
    """Return the product with a matrix that is block-diagonal over rows."""
    tokens, moving = _tokens(criterion, states, targets)

    def product(tangents: list[Tensor]) -> list[Tensor]:
        parts = _parts(tokens, moving, tangents)
        cotangents = (
            (chunk, matrix(chunk, rows)(tokens.pushed(parts, chunk)))
            for chunk, rows in tokens.chunks()
        )
        return _chosen(tokens.pulled(cotangents, _needed(moving)), moving, tangents)

    return moving, product


def _tokens(criterion: OfStates, states: States, targets: Tensor) -> tuple[Tokens, list[int]]:
    """Return the tokens, and the indices of the states that depend on the parameters.

    Raises:
        ValueError: If no state depends on the parameters.
    """
    moving = [i for i, state in enumerate(states) if state is not None and state.requires_grad]
    if not moving:
        raise ValueError(INDEPENDENT)
    hidden, weight, bias = (None if state is None else state.detach() for state in states)
    assert hidden is not None
    assert weight is not None
    rows, flat = counted(criterion.head, hidden, targets)
    return Tokens(criterion.head, rows, weight, bias, flat), moving


def _needed(moving: Sequence[int]) -> tuple[bool, bool, bool]:
    return 0 in moving, 1 in moving, 2 in moving


def _parts(tokens: Tokens, moving: Sequence[int], tangents: Sequence[Tensor]) -> Parts:
    """Return the tangents of rows of hidden states, weight and bias."""
    given = dict(zip(moving, tangents, strict=True))
    of_hidden = given.get(0)
    return (
        None if of_hidden is None else of_hidden.reshape(tokens.hidden.shape),
        given.get(1),
        given.get(2),
    )


def _chosen(parts: Parts, moving: Sequence[int], alike: Sequence[Tensor]) -> list[Tensor]:
    """Return the parts of the moving states, with the shapes of their tangents."""
    chosen = [parts[i] for i in moving]
    return [x.view(y.shape) for x, y in zip(chosen, alike, strict=True) if x is not None]
