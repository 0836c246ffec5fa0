"""Gauss-Newton matrices: the generalised Gauss-Newton matrix, the Fisher matrix, the empirical one.

All of them are ``J' B J``, with J the Jacobian of the model's outputs and B a positive matrix on
the outputs; they differ in B alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor

from hessfunc.autograd import differentiable_twice, explained, refuse_autocast
from hessfunc.autograd.contexts import kept_batch
from hessfunc.autograd.custom_functions import Verified, refuse_if_cut
from hessfunc.autograd.functorch import edges, linear_in_cotangents, pullback
from hessfunc.autograd.overrides import Replaced
from hessfunc.autograd.second_order import SECOND_ORDER
from hessfunc.containers import opened
from hessfunc.losses import Loss
from hessfunc.options import validated
from hessfunc.randomness import of_matrix
from hessfunc.spaces.of import space_of
from hessfunc.spaces.space import Space
from hessfunc.transforms.batches.checksum import batch_key
from hessfunc.transforms.batches.reductions import Reduction, noted
from hessfunc.transforms.chunks import (
    GAUSS_NEWTON_ENTRIES,
    Chunks,
    ChunkSize,
    Curvature,
    Product,
    block_matvec,
)
from hessfunc.transforms.criteria import (
    INDEPENDENT,
    by_autodiff,
    closed_form,
    example_weights,
    output_gradient,
    reduction_over_examples,
)
from hessfunc.transforms.hessian import checked, kept
from hessfunc.transforms.likelihoods import refuse_without_likelihood, sampled_fisher
from hessfunc.trees import Matvec, Tree

# The indices of the output leaves that matter, and the product of B with one vector of them.
_Middle: TypeAlias = tuple[list[int], Callable[[list[Tensor]], Sequence[Tensor]]]


@validated
def ggnvp(loss: Loss, /, *, chunk_size: ChunkSize = None) -> Curvature:
    """The generalised Gauss-Newton matrix, as a curvature function ``(params, batch) -> matvec``.

        G = J' H J

    with J the Jacobian of ``loss.outputs`` and H the Hessian of ``loss.criterion`` with respect to
    the outputs. G is the Hessian of the loss with the model replaced by its linearisation, and
    positive semi-definite for a criterion that is convex in the outputs. The output Hessians of
    cross-entropy, MSE and BCE-with-logits, and of criteria made by `with_output_hessian`, are
    applied in closed form; any other goes through autodiff, and warns where it is not convex.

    Args:
        loss: with its two halves, as made by `supervised` or `composed`.
        chunk_size: Number of vectors of a block that go through one pass by vmap, 1 for a loop,
            or None for the rule that `hvp` describes.

    Raises:
        TypeError: the loss does not show its halves.
        ValueError: (from the curvature function) the loss is not a finite scalar.
        NotImplementedError: (from the curvature function) autograd would lose a derivative, of a
            custom function whose backward detaches or leaves torch, or through a hook.
        RuntimeError: (from the matvec) params have changed in place since it was made. Autocast
            is enabled.

    Cost: the model is linearised once a batch; a product costs 4/3 gradients on a deep net. Models
    with custom autograd functions or hooks are checked once, as in `hvp`.

    Source: Schraudolph 2002, Fast curvature matrix-vector products; Martens 2014, arXiv 1412.1193.
    """
    tried: list[bool] = []
    verified: Verified = set()

    def middle(loss: Loss, outputs: Tree, batch: Any) -> _Middle:
        found = hessian_of_outputs(loss, outputs, batch, try_convexity=not tried, verified=verified)
        tried.append(True)
        return found

    return _gauss_newton(loss, middle, chunk_size)


@validated
def fvp(
    loss: Loss,
    /,
    *,
    samples: int | None = None,
    seed: int | None = None,
    chunk_size: ChunkSize = None,
) -> Curvature:
    """The Fisher information matrix, as a curvature function ``(params, batch) -> matvec``.

        F = mean over examples of E_y[g g'],  g = grad of -log p(y | example, params)

    with y drawn from the model's own prediction; where an example has several predictions
    (positions of cross-entropy, entries of BCE), they are independent and averaged. Exact, it
    equals the generalised Gauss-Newton matrix for cross-entropy (categorical y), for
    BCE-with-logits (Bernoulli), and for MSE with normal y of variance C/2, for C outputs an
    example (variance 1/2 where the loss is a sum):
    then MSE is -log p up to a constant.

    Args:
        loss: with its two halves, as made by `supervised`.
        samples: None for the exact expectation; else the number of draws of y for each prediction.
        seed: of the draws, which depend on (seed, batch) alone: each pass over the data draws the
            same. None draws a seed once, here.
        chunk_size: as in `ggnvp`.

    Raises:
        TypeError: the loss does not show its halves.
        ValueError: the criterion is not the negative logarithm of a known likelihood.

    Cost: as `ggnvp`.

    Source: Martens 2014, arXiv 1412.1193; Kunstner, Balles and Hennig 2019, arXiv 1905.12558.
    """
    refuse_without_halves(loss)
    refuse_without_likelihood(loss.criterion)
    if samples is None:
        return _gauss_newton(loss, hessian_of_outputs, chunk_size)
    if samples < 1:
        raise ValueError(f"samples={samples}: at least 1, or None for the exact matrix")
    seed = of_matrix(seed)

    def middle(loss: Loss, outputs: Tree, batch: Any) -> _Middle:
        key = batch_key(seed, batch, outputs.device)
        product = sampled_fisher(loss.criterion, outputs.detach(), batch, samples=samples, key=key)
        return [0], lambda tangents: [product(tangents[0])]

    return _gauss_newton(loss, middle, chunk_size)


@validated
def efvp(loss: Loss, /, *, chunk_size: ChunkSize = None) -> Curvature:
    """The empirical Fisher matrix, as a curvature function ``(params, batch) -> matvec``.

        E = mean over examples of g_b g_b', or their sum for a loss that is a sum

    with g_b the gradient of the loss of example b, the b-th entry of the first axis of the model's
    outputs. Examples whose targets are ignored do not count; those with more targets count more.
    It takes one gradient of the criterion with respect to the outputs, so the loss must be a mean
    or a sum over examples that do not see each other. Except for cross-entropy, MSE and
    BCE-with-logits, this is checked once, on the first batch with two examples or more: the
    criterion of the batch is compared with those of its examples.

    Over targets that are drawn from the model's own prediction, the expectation of E is the Fisher
    matrix F of `fvp` if each example has one prediction, as in classification. It is not where
    the loss of an example is itself a mean over several predictions: over n outputs of
    BCE-with-logits or MSE, or n positions of cross-entropy, E is smaller by a factor of about n,
    as it squares the mean over them and F is the mean of squares.

    Args:
        loss: with its two halves, as made by `supervised` or `composed`.
        chunk_size: as in `ggnvp`.

    Raises:
        TypeError: the loss does not show its halves.
        ValueError: (from the curvature function) output leaves differ in their number of examples;
            the criterion is neither the mean nor the sum of its examples, or could not be
            evaluated on one alone.

    Cost: as `ggnvp`.

    Source: Kunstner, Balles and Hennig 2019, arXiv 1905.12558, on what it is and is not.
    """
    known: list[Reduction] = []

    def middle(loss: Loss, outputs: Tree, batch: Any) -> _Middle:
        if not known:
            with torch.no_grad():
                reduction = reduction_over_examples(loss.criterion, outputs, batch)
            # A single example is its own mean and sum, and does not tell of other batches.
            known.extend([] if reduction is None else [reduction])
        return _empirical(loss, outputs, batch, known[0] if known else "sum")

    return _gauss_newton(loss, middle, chunk_size)


def _gauss_newton(
    loss: Loss, middle: Callable[[Loss, Tree, Any], _Middle], chunk_size: ChunkSize
) -> Curvature:
    refuse_without_halves(loss)
    chunks = Chunks(chunk_size, GAUSS_NEWTON_ENTRIES)
    verified: Verified = set()

    def curvature(params: Tree, batch: Any) -> Matvec:
        space = space_of(params)
        refuse_autocast(space.device)
        leaves = space.tree_leaves(params)
        with torch.inference_mode(False), explained(space, batch), noted(loss, params, batch):
            batch = kept_batch(batch)
            point = kept(leaves)
            with differentiable_twice(space.device, SECOND_ORDER) as seen:
                product = _product(loss, middle, space, point, batch, seen, verified)
        return block_matvec(product, space, leaves, batch, chunks=chunks, copies=point)

    return curvature


def refuse_without_halves(loss: Any) -> None:
    """Raise for a loss that is a plain function."""
    if not isinstance(loss, Loss):
        raise TypeError(
            "a Gauss-Newton matrix needs the two halves of the loss, outputs and criterion: make "
            "it by `supervised(model_fn, criterion)` or `composed(outputs, criterion)`"
        )


def _product(
    loss: Loss,
    middle: Callable[[Loss, Tree, Any], _Middle],
    space: Space,
    point: Sequence[Tensor],
    batch: Any,
    seen: Replaced,
    verified: Verified,
) -> Product:
    inputs = [leaf.detach().requires_grad_() for leaf in point]
    outputs = checked_outputs(loss, space, inputs, batch)
    hooks = tuple(seen.hooks)
    used, between = middle(loss, outputs, batch)
    leaves, _ = opened(outputs, "outputs")
    ends = [leaves[i] for i in used]
    refuse_if_outputs_are_cut(loss, space, inputs, ends, used, batch, hooks, verified)
    return linearised(inputs, ends, [end.shape for end in ends], between)


def refuse_if_outputs_are_cut(
    loss: Loss,
    space: Space,
    inputs: Sequence[Tensor],
    ends: Sequence[Tensor],
    used: Sequence[int],
    batch: Any,
    hooks: Sequence[str],
    verified: Verified,
) -> None:
    """Refuse outputs whose Jacobian autograd would lose part of.

    J v is found as the derivative of the pullback J'w with respect to w.
    """

    def again(leaves: Sequence[Tensor]) -> list[Tensor]:
        outputs, _ = opened(loss.outputs(space.tree(leaves), batch), "outputs")
        return [outputs[i] for i in used]

    refuse_if_cut(ends, inputs, again, hooks=hooks, verified=verified, linear=True)


def checked_outputs(loss: Loss, space: Space, inputs: Sequence[Tensor], batch: Any) -> Tree:
    """The outputs of the model, if they depend on params and the loss is a finite scalar."""
    outputs = loss.outputs(space.tree(inputs), batch)
    with torch.no_grad():
        checked(loss.criterion(outputs, batch), space, inputs)
    if isinstance(outputs, Tensor) and not outputs.requires_grad:
        raise ValueError(INDEPENDENT)
    return outputs


def linearised(
    inputs: Sequence[Tensor],
    ends: Sequence[Any],
    shapes: Sequence[torch.Size],
    between: Callable[[list[Tensor]], Sequence[Tensor]],
) -> Product:
    """The product ``J' B J v``, with J the Jacobian of some places of a graph and B on these.

    Args:
        inputs: the leaves at which the graph starts.
        ends: the places: tensors, or edges of the graph.
        shapes: of the ends.
        between: the product of B with one vector.
    """
    # J'w is linear in w, so J v is the derivative of (J'w)'v with respect to w, at any w.
    cotangents = [
        torch.zeros((), dtype=inputs[0].dtype, device=inputs[0].device)
        .expand(shape)
        .requires_grad_()
        for shape in shapes
    ]
    with linear_in_cotangents():
        slopes = torch.autograd.grad(
            ends, inputs, cotangents, create_graph=True, materialize_grads=True
        )
    moving = [i for i, g in enumerate(slopes) if g.requires_grad]
    # Only where they stand in the graph: their values, zero, are not needed.
    pushed = pullback(edges([slopes[i] for i in moving]), cotangents)
    pulled = pullback(ends, inputs)
    return lambda tangents: pulled(between(pushed([tangents[i] for i in moving])))


def hessian_of_outputs(
    loss: Loss,
    outputs: Tree,
    batch: Any,
    *,
    try_convexity: bool = False,
    verified: Verified | None = None,
) -> _Middle:
    """B = the Hessian of the criterion."""
    known = closed_form(loss.criterion)
    if known is None or not isinstance(outputs, Tensor):
        return by_autodiff(
            loss.criterion,
            outputs,
            batch,
            try_convexity=try_convexity,
            verified=verified,
        )
    product = known(outputs.detach(), batch)
    return [0], lambda tangents: [product(tangents[0])]


def _empirical(loss: Loss, outputs: Tree, batch: Any, reduction: Reduction) -> _Middle:
    """B = c_b r_b r_b' for each example b, with r_b its part of the gradient at the outputs."""
    used, _, slopes = output_gradient(loss.criterion, outputs, batch, create_graph=False)
    counts = {len(g) if g.dim() else 1 for g in slopes}
    if len(counts) != 1:
        raise ValueError(
            f"the outputs have {sorted(counts)} examples along their first axes: an empirical "
            "Fisher matrix needs one gradient an example"
        )
    count = counts.pop()
    weights = example_weights(loss.criterion, outputs, batch, count, reduction)
    rows = [g.reshape(count, -1) for g in slopes]

    def product(tangents: list[Tensor]) -> list[Tensor]:
        moved = [t.reshape(count, -1) for t in tangents]
        along = torch.stack([(r * t).sum(1) for r, t in zip(rows, moved, strict=True)]).sum(0)
        scaled = (weights * along)[:, None]
        return [(scaled * r).view_as(g) for r, g in zip(rows, slopes, strict=True)]

    return used, product
