"""Losses of models that end in a linear layer and a cross-entropy, such as language models."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

from torch import Tensor
from torch.nn import functional as F

from hessfunc import options
from hessfunc.autograd.linear_cross_entropy import loss_of
from hessfunc.autograd.logits import Head
from hessfunc.losses import Loss, OfTargets
from hessfunc.trees import Tree

# Hidden states ``[..., d]``, and the weight ``[V, d]`` and the bias ``[V]`` of the linear layer.
States: TypeAlias = tuple[Tensor, Tensor, Tensor | None]


@dataclass(frozen=True)
class LinearHeadLoss(Loss):
    """Cross-entropy of a linear layer, the head, whose logits are never whole.

    ``outputs`` and ``criterion`` compute the logits of all tokens. The loss itself, and Hessian,
    Gauss-Newton and Fisher products, compute those of a few tokens at a time. All other curvatures,
    and products inside of transforms, use ``outputs``.

    Attributes:
        states: Function ``(params, batch)`` that returns hidden states, weight and bias.
        targets: Function that returns the targets of a batch.
        head: Options of the cross-entropy.
    """

    states: Callable[[Tree, Any], States]
    targets: Callable[[Any], Tensor]
    head: Head

    def __call__(self, params: Tree, batch: Any, /) -> Tensor:
        return loss_of(self.head, *self.states(params, batch), self.targets(batch))

    def of(self, whole: Callable[[Tree], Tree], /) -> LinearHeadLoss:
        states = self.states
        return _of_states(
            lambda params, batch: states(whole(params), batch), self.targets, self.head
        )

    def by_states(self) -> Loss:
        """Return the loss with the hidden states, weight and bias as its outputs."""
        return Loss(self.states, OfStates(self.head, self.targets))


@dataclass(frozen=True)
class OfStates:
    """Cross-entropy as a criterion of hidden states, weight and bias.

    Attributes:
        head: Options of the cross-entropy.
        targets: Function that returns the targets of a batch.
    """

    head: Head
    targets: Callable[[Any], Tensor]

    def __call__(self, states: States, batch: Any, /) -> Tensor:
        return loss_of(self.head, *states, self.targets(batch))


@options.validated(
    states=options.function_of(2, "(params, batch)"),
    scale=options.finite,
    softcap=options.finite,
    label_smoothing=options.finite,
    reduction=options.text,
)
def linear_head_loss(
    states: Callable[[Tree, Any], States],
    targets: Callable[[Any], Tensor],
    /,
    *,
    scale: float = 1.0,
    softcap: float | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    reduction: Literal["mean", "sum"] = "mean",
    rows_per_chunk: int | None = None,
) -> LinearHeadLoss:
    """Return the cross-entropy of a model that ends in a linear layer, without whole logits.

        z = cap(scale (h W' + b)),   loss = mean over tokens of -log softmax(z)[target]

    Loss, gradient and the products of `hvp`, `ggnvp`, `fvp` and `efvp` compute the logits of a few
    tokens at a time. Their memory does not depend on (number of tokens) x (number of classes).
    Inside transforms of torch.func, in forward mode, with ``differentiable=True`` and for all other
    curvatures, such as Kronecker factors, the logits are whole.

    Args:
        states: Function ``(params, batch) -> (hidden, weight, bias)`` with hidden states h
            ``[..., d]``, the weight W ``[V, d]`` and the bias b ``[V]`` or None. It must take the
            weight from ``params`` if the weight is trained.
        targets: Function that returns the targets of a batch, integers of shape ``[...]``.
        scale: Factor of the logits.
        softcap: Bound c of the logits, cap(z) = c tanh(z / c); None for no bound.
        ignore_index: Target of tokens that do not count.
        label_smoothing: Weight of the uniform distribution in the target distribution.
        reduction: Mean or sum over the tokens that count.
        rows_per_chunk: Number of tokens whose logits exist at once; None for at most 2^22 logits.

    Cost: a Hessian product takes 7/6 of the matrix products of the head with whole logits.

    Source: Hsu et al. 2024, arXiv 2410.10989, for the gradient.
    """
    head = Head(scale, softcap, ignore_index, label_smoothing, reduction, rows_per_chunk)
    return _of_states(states, targets, head)


def _of_states(
    states: Callable[[Tree, Any], States], targets: Callable[[Any], Tensor], head: Head
) -> LinearHeadLoss:
    cross_entropy = functools.partial(
        F.cross_entropy,
        ignore_index=head.ignore_index,
        label_smoothing=head.label_smoothing,
        reduction=head.reduction,
    )

    def logits(params: Tree, batch: Any) -> Tensor:
        hidden, weight, bias = states(params, batch)
        return head.logits(F.linear(hidden, weight, bias)).movedim(-1, min(1, hidden.dim() - 1))

    return LinearHeadLoss(logits, OfTargets(cross_entropy, targets), states, targets, head)
