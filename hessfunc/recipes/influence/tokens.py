"""Parts of the tokens in the score of a training example."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.func import jvp
from torch.nn import functional as F

from hessfunc.autograd import differentiable_twice
from hessfunc.losses import Loss, LossFunction
from hessfunc.spaces.of import space_of
from hessfunc.training_mode import several_batches
from hessfunc.transforms.batches.examples import examples
from hessfunc.transforms.criteria import (
    declared_reduction,
    function_and_options,
    with_targets,
    without_wrappers,
)
from hessfunc.trees import Tree

# Function (params, batch) -> losses (B, T) of the tokens, which sum to the loss of each example.
TokenLosses: TypeAlias = Callable[[Tree, Any], Tensor]


def token_losses(loss: LossFunction, /) -> TokenLosses:
    """Return the losses of the tokens of a cross-entropy, which sum to the loss of each example.

    Raises:
        ValueError: If the criterion is not a cross-entropy without class weights.
    """
    if not isinstance(loss, Loss):
        raise ValueError(_UNKNOWN)
    function, options = function_and_options(without_wrappers(loss.criterion))
    reduction = declared_reduction(loss.criterion)
    if function is not F.cross_entropy or options.get("weight") is not None or reduction is None:
        raise ValueError(_UNKNOWN)
    ignored, smoothing = options.get("ignore_index", -100), options.get("label_smoothing", 0.0)

    def losses(params: Tree, batch: Any) -> Tensor:
        _, targets = with_targets(loss.criterion, batch)
        each = F.cross_entropy(
            loss.outputs(params, batch),
            targets,
            ignore_index=ignored,
            label_smoothing=smoothing,
            reduction="none",
        ).reshape(examples(batch), -1)
        if reduction == "sum":
            return each
        if targets.is_floating_point():
            return each / each.shape[1]
        counts = (targets != ignored).reshape(len(each), -1).sum(1, keepdim=True)
        return each / counts.clamp_min(1)

    return losses


_UNKNOWN = (
    "the tokens of this loss are unknown, because its criterion is not cross_entropy without class "
    "weights: pass by_token=function with (params, batch) -> losses (examples, tokens), which sum "
    "to the loss of each example"
)


def token_scores(
    losses: TokenLosses, params: Tree, batch: Any, solutions: Tensor, scores: Tensor, /
) -> Tensor:
    """Return the derivatives of the losses of tokens along solutions, float64 ``(r, m, T)``.

    One forward-mode product for each solution gives the parts of all tokens of a batch.

    Raises:
        ValueError: If the parts of the tokens do not sum to the scores ``(r, m)``.
    """
    space = space_of(params)
    point = tuple(leaf.detach() for leaf in space.tree_leaves(params))

    def of_leaves(*leaves: Tensor) -> Tensor:
        return losses(space.tree(leaves), batch)

    parts = []
    with torch.inference_mode(False), several_batches(), differentiable_twice(space.device):
        for row in solutions:
            pairs = zip(space.block_leaves(space.views(row[None])), point, strict=True)
            tangents = tuple(leaf[0].to(own) for leaf, own in pairs)
            parts.append(jvp(of_leaves, point, tangents)[1].detach().double().cpu())
    tokens = torch.stack(parts)
    if tokens.dim() != 3 or tokens.shape[:2] != scores.shape:
        raise ValueError(
            f"the losses of tokens have the shape {tuple(tokens.shape[1:])} for "
            f"{scores.shape[1]} examples: return a tensor of shape (examples, tokens)"
        )
    error = (tokens.sum(2) - scores).abs().amax()
    size = tokens.abs().sum(2).amax()
    if bool(error > torch.finfo(point[0].dtype).eps ** 0.5 * size):
        raise ValueError(
            "the losses of the tokens do not sum to the losses of the examples, from which their "
            f"scores differ by {float(error):.2g}: divide them by the number of tokens of each "
            "example if the loss is a mean"
        )
    return tokens
