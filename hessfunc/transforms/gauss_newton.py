"""Gauss-Newton matrices: generalised Gauss-Newton, Fisher and empirical Fisher.

All three are ``J' B J``, with the Jacobian J of the model's outputs and a matrix B on the outputs.
They differ only in B.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor

from hessfunc.autograd import differentiable_twice, explained, refuse_autocast
from hessfunc.autograd.constant_matrix import Product, leaves_of_graph
from hessfunc.autograd.contexts import kept_batch
from hessfunc.autograd.custom_functions import Verified, refuse_if_cut
from hessfunc.autograd.functorch import (
    edges,
    is_wrapped,
    linear_in_cotangents,
    plain_evaluation,
    pullback,
    transforming,
)
from hessfunc.autograd.overrides import Replaced
from hessfunc.autograd.second_order import SECOND_ORDER
from hessfunc.changes import reading
from hessfunc.containers import batch_leaves, opened
from hessfunc.losses import Loss
from hessfunc.options import validated
from hessfunc.randomness import of_matrix
from hessfunc.spaces.of import space_of
from hessfunc.spaces.space import Space
from hessfunc.transforms.batches.checksum import batch_key
from hessfunc.transforms.batches.reductions import noted
from hessfunc.transforms.chunks import (
    GAUSS_NEWTON_ENTRIES,
    Chunks,
    ChunkSize,
    Curvature,
    block_matvec,
)
from hessfunc.transforms.criteria import Reduction, closed_form
from hessfunc.transforms.differentiable import (
    Linearisation,
    Rebuild,
    differentiable_matvec,
    every_order,
    pullback_with_graph,
    refuse_untransformable,
)
from hessfunc.transforms.example_weights import example_weights, reduction_over_examples
from hessfunc.transforms.hessian import checked, kept, requiring_gradients, scalar
from hessfunc.transforms.likelihoods import refuse_without_likelihood, sampled_fisher
from hessfunc.transforms.output_gradients import (
    INDEPENDENT,
    by_autodiff,
    by_transforms,
    output_gradient,
    slopes_by_transforms,
)
from hessfunc.transforms.outputs import Rest, floating_part
from hessfunc.trees import Matvec, Tree

# Indices of the output leaves on which B acts, and the product of B with one vector.
_Middle: TypeAlias = tuple[list[int], Callable[[list[Tensor]], Sequence[Tensor]]]
_OfOutputs: TypeAlias = Callable[[Loss, Tree, Any], _Middle]


@dataclass(frozen=True)
class _OutputMatrix:
    """Matrix B on the outputs of a model, as a function ``(loss, outputs, batch)``.

    Attributes:
        constant: B at fixed outputs.
        attached: B with the graph of the outputs and the batch.
    """

    constant: _OfOutputs
    attached: _OfOutputs


@validated
def ggnvp(
    loss: Loss, /, *, chunk_size: ChunkSize = None, differentiable: bool = False
) -> Curvature:
    """Return the generalised Gauss-Newton matrix as a function ``(params, batch) -> matvec``.

        G = J' H J

    J is the Jacobian of ``loss.outputs``, and H is the Hessian of ``loss.criterion`` with respect
    to the outputs. G is the Hessian of the loss of the linearised model. It is positive
    semi-definite if the criterion is convex in the outputs.

    The output Hessians of cross-entropy, MSE and BCE-with-logits, and of criteria made by
    `with_output_hessian`, are applied in closed form. Other criteria are differentiated by
    autograd, with a warning if the criterion is not convex or is linear in the outputs.

    Args:
        loss: Loss with outputs and criterion, as returned by `supervised` or `composed`.
        chunk_size: Number of vectors of a block that go through one pass by vmap; 1 is a loop,
            and None follows the rule that `hvp` describes.
        differentiable: Whether products carry the graph of params and batch, as in `hvp`.

    Raises:
        TypeError: If ``loss`` is a plain function without outputs and criterion.
        ValueError: If the loss is not a finite scalar; raised by the curvature function.
        NotImplementedError: If autograd would lose a derivative, in a custom function whose
            backward detaches or leaves torch, or in a hook; raised by the curvature function.
        RuntimeError: If params have changed in place since the matvec was made, or if autocast is
            enabled; raised by the matvec.

    Cost: the model is linearised once per batch. A product costs 4/3 gradients on a deep net.
    Models with custom autograd functions or hooks are checked once, as in `hvp`.

    Source: Schraudolph 2002, Fast curvature matrix-vector products; Martens 2014, arXiv 1412.1193.
    """
    tried: list[bool] = []
    verified: Verified = set()

    def hessian(loss: Loss, outputs: Tree, batch: Any) -> _Middle:
        hessian = hessian_of_outputs(
            loss, outputs, batch, try_convexity=not tried, verified=verified
        )
        tried.append(True)
        return hessian

    matrix = _OutputMatrix(hessian, _attached_hessian)
    return _gauss_newton(loss, matrix, chunk_size, differentiable=differentiable)


@validated
def fvp(
    loss: Loss,
    /,
    *,
    samples: int | None = None,
    seed: int | None = None,
    chunk_size: ChunkSize = None,
    differentiable: bool = False,
) -> Curvature:
    """Return the Fisher information matrix as a function ``(params, batch) -> matvec``.

        F = mean over examples of E_y[g g'],  g = grad of -log p(y | example, params)

    The targets y are drawn from the model's own prediction. If an example has several predictions
    (positions of cross-entropy, entries of BCE), they are independent and averaged.

    The exact expectation equals the generalised Gauss-Newton matrix for cross-entropy (categorical
    y), for BCE-with-logits (Bernoulli y), and for MSE with normal y. For MSE the variance is C/2
    for C outputs per example, or 1/2 if the loss is a sum, so that MSE is -log p up to a constant.

    Args:
        loss: Loss with outputs and criterion, as returned by `supervised`.
        samples: Number of draws of y for each prediction; None for the exact expectation.
        seed: Seed of the draws. They depend only on (seed, batch), so each pass over the data
            draws the same targets. None chooses a seed when `fvp` is called.
        chunk_size: Number of vectors in one pass, as in `ggnvp`.
        differentiable: Whether products carry the graph of params and batch, as in `hvp`. Drawn
            targets are constant.

    Raises:
        TypeError: If ``loss`` is a plain function without outputs and criterion.
        ValueError: If the criterion is not the negative logarithm of a known likelihood.
        NotImplementedError: If targets are to be drawn for a batch that belongs to a transform,
            such as a mapped one; raised by the curvature function.

    Cost: the same as `ggnvp`.

    Source: Martens 2014, arXiv 1412.1193; Kunstner, Balles and Hennig 2019, arXiv 1905.12558.
    """
    refuse_without_halves(loss)
    refuse_without_likelihood(loss.criterion)
    if samples is None:
        matrix = _OutputMatrix(hessian_of_outputs, _attached_hessian)
        return _gauss_newton(loss, matrix, chunk_size, differentiable=differentiable)
    if samples < 1:
        raise ValueError(f"samples={samples}: it must be at least 1, or None for the exact matrix")
    seed = of_matrix(seed)

    def attached(loss: Loss, outputs: Tree, batch: Any) -> _Middle:
        _refuse_unknown_examples(batch)
        with plain_evaluation():
            key = batch_key(seed, batch, outputs.device)
        product = sampled_fisher(loss.criterion, outputs, batch, samples=samples, key=key)
        return [0], lambda tangents: [product(tangents[0])]

    def constant(loss: Loss, outputs: Tree, batch: Any) -> _Middle:
        return attached(loss, outputs.detach(), batch)

    matrix = _OutputMatrix(constant, attached)
    return _gauss_newton(loss, matrix, chunk_size, differentiable=differentiable)


def _refuse_unknown_examples(batch: Any) -> None:
    """Raise if the values of a batch, which seed the draws of its targets, cannot be read."""
    if torch.compiler.is_compiling() or any(map(is_wrapped, batch_leaves(batch))):
        raise NotImplementedError(
            "the targets of `fvp(loss, samples=...)` are drawn from a seed and the values of the "
            "batch, which a transform or torch.compile hides: use the exact matrix, `fvp(loss)`"
        )


@validated
def efvp(loss: Loss, /, *, chunk_size: ChunkSize = None, differentiable: bool = False) -> Curvature:
    """Return the empirical Fisher matrix as a function ``(params, batch) -> matvec``.

        E = mean over examples of g_b g_b'

    g_b is the gradient of the loss of example b, the b-th entry of the first axis of the model's
    outputs. If the loss is a sum over examples, E is the sum. Examples whose targets are ignored do
    not count, and examples with more targets count more.

    E is computed from one gradient of the criterion with respect to the outputs. The loss must
    therefore be a mean or a sum over examples that do not interact. Cross-entropy, MSE and
    BCE-with-logits are known to be. For any other criterion, its value on the first batch with at
    least two examples is compared with its values on the single examples.

    For targets drawn from the model's own prediction, the expectation of E is the Fisher matrix F
    of `fvp` if each example has one prediction, as in classification. The two differ if the loss
    of an example is itself a mean over n predictions: n outputs of BCE-with-logits or MSE, or n
    positions of cross-entropy. E squares that mean, whereas F is a mean of squares, so E is
    smaller by a factor of about n.

    Args:
        loss: Loss with outputs and criterion, as returned by `supervised` or `composed`.
        chunk_size: Number of vectors in one pass, as in `ggnvp`.
        differentiable: Whether products carry the graph of params and batch, as in `hvp`.

    Raises:
        TypeError: If ``loss`` is a plain function without outputs and criterion.
        ValueError: If output leaves differ in their number of examples, or if the criterion is
            neither the mean nor the sum of its examples or cannot be evaluated on a single one;
            raised by the curvature function.
        NotImplementedError: If it is unknown whether the criterion is a mean or a sum, and a
            transform or torch.compile hides its values; raised by the curvature function.

    Cost: the same as `ggnvp`.

    Source: Kunstner, Balles and Hennig 2019, arXiv 1905.12558, on its limitations.
    """
    known: list[Reduction] = []

    def reduction(loss: Loss, outputs: Tree, batch: Any) -> Reduction:
        if not known:
            with torch.no_grad():
                found = reduction_over_examples(loss.criterion, outputs, batch)
            # For a single example, mean and sum are equal, so the reduction stays unknown.
            known.extend([] if found is None else [found])
        return known[0] if known else "sum"

    def constant(loss: Loss, outputs: Tree, batch: Any) -> _Middle:
        weighting = reduction(loss, outputs, batch)
        used, _, slopes = output_gradient(loss.criterion, outputs, batch, create_graph=False)
        return used, _empirical(loss, outputs, batch, slopes, weighting)

    def attached(loss: Loss, outputs: Tree, batch: Any) -> _Middle:
        weighting = reduction(loss, outputs, batch)
        used, slopes = slopes_by_transforms(loss.criterion, outputs, batch)
        return used, _empirical(loss, outputs, batch, slopes, weighting)

    matrix = _OutputMatrix(constant, attached)
    return _gauss_newton(loss, matrix, chunk_size, differentiable=differentiable)


def _gauss_newton(
    loss: Loss, matrix: _OutputMatrix, chunk_size: ChunkSize, *, differentiable: bool
) -> Curvature:
    refuse_without_halves(loss)
    chunks = Chunks(chunk_size, GAUSS_NEWTON_ENTRIES)
    verified: Verified = set()

    def curvature(params: Tree, batch: Any) -> Matvec:
        if differentiable or transforming():
            with noted(loss, params, batch):
                return differentiable_matvec(
                    _GaussNewton(loss, matrix, verified), params, batch, chunk_size=chunk_size
                )
        space = space_of(params)
        refuse_autocast(space.device)
        leaves = space.tree_leaves(params)
        constants = requiring_gradients(leaves, batch)
        with (
            torch.inference_mode(False),
            explained(space, batch),
            noted(loss, params, batch),
            reading() as read,
        ):
            batch = kept_batch(batch)
            point = kept(leaves)
            inputs = [leaf.detach().requires_grad_() for leaf in point]
            with differentiable_twice(space.device, SECOND_ORDER) as seen:
                ends, between = _ends(loss, matrix.constant, space, inputs, batch, seen, verified)
                constants += leaves_of_graph(ends, inputs)
                product = linearised(inputs, ends, [end.shape for end in ends], between)
        return block_matvec(
            product,
            space,
            leaves,
            batch,
            chunks=chunks,
            copies=point,
            refuse_if_changed=read.unchanged(again=False),
            constants=constants,
        )

    return curvature


def refuse_without_halves(loss: Any) -> None:
    """Raise TypeError if a loss is a plain function without outputs and criterion."""
    if not isinstance(loss, Loss):
        raise TypeError(
            "a Gauss-Newton matrix needs the two halves of the loss, outputs and criterion: pass "
            "`supervised(model_fn, criterion)` or `composed(outputs, criterion)`"
        )


def _ends(
    loss: Loss,
    matrix: _OfOutputs,
    space: Space,
    inputs: Sequence[Tensor],
    batch: Any,
    seen: Replaced,
    verified: Verified,
) -> tuple[list[Tensor], Callable[[list[Tensor]], Sequence[Tensor]]]:
    """Return the outputs on which B acts, with their graph, and the product of B."""
    outputs = checked_outputs(loss, space, inputs, batch)
    hooks = tuple(seen.hooks)
    used, between = matrix(loss, outputs, batch)
    leaves, _ = opened(outputs, "outputs")
    ends = [leaves[i] for i in used]
    refuse_if_outputs_are_cut(loss, space, inputs, ends, used, batch, hooks, verified)
    return ends, between


@dataclass(frozen=True)
class _GaussNewton(Linearisation):
    """Differentiable matrix ``J' B J``.

    Attributes:
        loss: Loss with outputs and criterion.
        matrix: Matrix B on the outputs.
        verified: Custom functions that have been verified.
    """

    loss: Loss
    matrix: _OutputMatrix
    verified: Verified

    def by_transforms(self, rebuild: Rebuild, point: Sequence[Tensor], batch: Any, /) -> Product:
        rest: Rest

        def floating(*leaves: Tensor) -> tuple[Tensor, ...]:
            nonlocal rest
            with every_order(leaves[0].device):
                outputs = self.loss.outputs(rebuild(leaves), batch)
            found, rest = floating_part(outputs)
            for leaf in found[:1]:
                refuse_untransformable(leaf)
            return tuple(found)

        ends, pulled = torch.func.vjp(floating, *point)[:2]
        # J'w is linear in w. Hence the pullback of w -> J'w maps v to J v.
        zeros = [torch.zeros_like(end) for end in ends]
        pushed = torch.func.vjp(lambda *w: pulled(w), *zeros)[1]
        with every_order(point[0].device):
            scalar(self.loss.criterion(rest.outputs(ends), batch))
            used, between = self.matrix.attached(self.loss, rest.outputs(ends), batch)

        def product(tangents: Sequence[Tensor]) -> Sequence[Tensor]:
            moved = pushed(tuple(tangents))
            chosen = [rest.places.index(i) for i in used]
            parts = dict(zip(chosen, between([moved[i] for i in chosen]), strict=True))
            return pulled(tuple(parts.get(i, zero) for i, zero in enumerate(zeros)))

        return product

    def by_autograd(self, rebuild: Rebuild, point: Sequence[Tensor], batch: Any, /) -> Product:
        space = space_of(rebuild(point))
        with every_order(space.device) as seen:
            ends, between = _ends(
                self.loss, self.matrix.attached, space, point, batch, seen, self.verified
            )
        cotangents = [torch.zeros_like(end).detach().requires_grad_() for end in ends]
        slopes = pullback_with_graph(ends, point)(cotangents)
        moving = [i for i, g in enumerate(slopes) if g.requires_grad]
        pushed = pullback_with_graph([slopes[i] for i in moving], cotangents)
        pulled = pullback_with_graph(ends, point)
        return lambda tangents: pulled(between(list(pushed([tangents[i] for i in moving]))))


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
    """Raise if autograd would lose a part of the Jacobian J of the outputs.

    J v is computed as the derivative of the pullback J'w with respect to w.
    """

    def again(leaves: Sequence[Tensor]) -> list[Tensor]:
        outputs, _ = opened(loss.outputs(space.tree(leaves), batch), "outputs")
        return [outputs[i] for i in used]

    refuse_if_cut(ends, inputs, again, hooks=hooks, verified=verified, linear=True)


def checked_outputs(loss: Loss, space: Space, inputs: Sequence[Tensor], batch: Any) -> Tree:
    """Return the outputs of the model, after checking them and the loss.

    Raises:
        ValueError: If the outputs do not depend on params, or the loss is not a finite scalar.
    """
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
    """Return the product ``J' B J v``, with the Jacobian J of some ends of a graph.

    Args:
        inputs: Leaves at the start of the graph.
        ends: Tensors or edges at the end of the graph.
        shapes: Shape of each end.
        between: Product of B with one vector.
    """
    # J'w is linear in w. Hence J v = d/dw <J'w, v> at any w; here w = 0.
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
    # Edges of the graph suffice, so that the values of the gradients can be freed.
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
    """Return B, the Hessian of the criterion with respect to the outputs."""
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


def _attached_hessian(loss: Loss, outputs: Tree, batch: Any) -> _Middle:
    """Return B as `hessian_of_outputs` does, with the graph of the outputs and the batch."""
    known = closed_form(loss.criterion)
    if known is None or not isinstance(outputs, Tensor):
        return by_transforms(loss.criterion, outputs, batch)
    product = known(outputs, batch)
    return [0], lambda tangents: [product(tangents[0])]


def _empirical(
    loss: Loss, outputs: Tree, batch: Any, slopes: Sequence[Tensor], reduction: Reduction
) -> Callable[[list[Tensor]], list[Tensor]]:
    """Return the product of B with one block c_b r_b r_b' per example b.

    r_b is the part of example b in ``slopes``, the gradient with respect to the outputs, and c_b is
    the weight from `example_weights`.
    """
    counts = {len(g) if g.dim() else 1 for g in slopes}
    if len(counts) != 1:
        raise ValueError(
            f"the outputs have {sorted(counts)} examples along their first axes, but an empirical "
            "Fisher matrix needs one gradient per example: return outputs with equal first axes"
        )
    count = counts.pop()
    weights = example_weights(loss.criterion, outputs, batch, count, reduction)
    rows = [g.reshape(count, -1) for g in slopes]

    def product(tangents: list[Tensor]) -> list[Tensor]:
        # B u = c_b r_b <r_b, u_b> for each example b.
        moved = [t.reshape(count, -1) for t in tangents]
        along = torch.stack([(r * t).sum(1) for r, t in zip(rows, moved, strict=True)]).sum(0)
        scaled = (weights * along)[:, None]
        return [(scaled * r).view_as(g) for r, g in zip(rows, slopes, strict=True)]

    return product
