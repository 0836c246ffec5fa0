"""Gauss-Newton matrices: generalised Gauss-Newton, Fisher and empirical Fisher.

All three are ``J' B J``, with the Jacobian J of the model's outputs and a matrix B on the outputs.
They differ only in B.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from hessfunc.autograd.custom_functions import Verified
from hessfunc.autograd.functorch import is_wrapped, plain_evaluation
from hessfunc.containers import batch_leaves
from hessfunc.linear_head import OfStates
from hessfunc.losses import Loss
from hessfunc.options import validated
from hessfunc.randomness import of_matrix
from hessfunc.transforms import linear_head
from hessfunc.transforms.batches.checksum import batch_key
from hessfunc.transforms.chunks import ChunkSize, Curvature
from hessfunc.transforms.criteria import Reduction, closed_form
from hessfunc.transforms.example_weights import example_weights, reduction_over_examples
from hessfunc.transforms.likelihoods import refuse_without_likelihood, sampled_fisher
from hessfunc.transforms.output_gradients import (
    by_autodiff,
    by_transforms,
    output_gradient,
    slopes_by_transforms,
)
from hessfunc.transforms.output_matrices import (
    OnOutputs,
    OutputMatrix,
    refuse_without_halves,
    through_outputs,
)
from hessfunc.trees import Tree


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

    Examples:
        >>> loss = hf.supervised(lambda w, x: x @ w, torch.nn.functional.mse_loss)
        >>> batch = torch.tensor([[1.0, 0.0], [1.0, 2.0]]), torch.zeros(2)
        >>> matvec = hf.ggnvp(loss)(torch.zeros(2), batch)
        >>> hf.matrix(matvec, torch.zeros(2))  # the mean of 2 x x'
        tensor([[2., 2.],
                [2., 4.]])

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

    def hessian(loss: Loss, outputs: Tree, batch: Any) -> OnOutputs:
        hessian = hessian_of_outputs(
            loss, outputs, batch, try_convexity=not tried, verified=verified
        )
        tried.append(True)
        return hessian

    matrix = OutputMatrix(hessian, _attached_hessian)
    return through_outputs(loss, matrix, chunk_size, differentiable=differentiable)


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

    Examples:
        >>> model_fn, params = hf.functional(torch.nn.Linear(3, 2, bias=False))
        >>> loss = hf.supervised(model_fn, torch.nn.functional.cross_entropy)
        >>> batch = torch.randn(5, 3), torch.tensor([0, 1, 1, 0, 1])
        >>> F = hf.matrix(hf.fvp(loss)(params, batch), params)
        >>> torch.allclose(F, hf.matrix(hf.ggnvp(loss)(params, batch), params), atol=1e-6)
        True

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
        matrix = OutputMatrix(hessian_of_outputs, _attached_hessian)
        return through_outputs(loss, matrix, chunk_size, differentiable=differentiable)
    if samples < 1:
        raise ValueError(f"samples={samples}: it must be at least 1, or None for the exact matrix")
    seed = of_matrix(seed)

    def attached(loss: Loss, outputs: Tree, batch: Any) -> OnOutputs:
        _refuse_unknown_examples(batch)
        with plain_evaluation():
            key = batch_key(seed, batch, outputs.device)
        product = sampled_fisher(loss.criterion, outputs, batch, samples=samples, key=key)
        return [0], lambda tangents: [product(tangents[0])]

    def constant(loss: Loss, outputs: Tree, batch: Any) -> OnOutputs:
        if isinstance(criterion := loss.criterion, OfStates):
            key = batch_key(seed, batch, outputs[0].device)
            targets = criterion.targets(batch)
            return linear_head.sampled_fisher(criterion, outputs, targets, samples=samples, key=key)
        return attached(loss, outputs.detach(), batch)

    # The draws of an example depend on all examples of its batch.
    matrix = OutputMatrix(constant, attached, by_rows=False)
    return through_outputs(loss, matrix, chunk_size, differentiable=differentiable)


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

    Examples:
        >>> loss = hf.supervised(lambda w, x: x @ w, torch.nn.functional.mse_loss)
        >>> batch = torch.eye(2), torch.tensor([1.0, 2.0])
        >>> hf.matrix(hf.efvp(loss)(torch.zeros(2), batch), torch.zeros(2))  # gradients -2 x y
        tensor([[2., 0.],
                [0., 8.]])

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

    def constant(loss: Loss, outputs: Tree, batch: Any) -> OnOutputs:
        if isinstance(criterion := loss.criterion, OfStates):
            return linear_head.empirical_fisher(criterion, outputs, criterion.targets(batch))
        weighting = reduction(loss, outputs, batch)
        used, _, slopes = output_gradient(loss.criterion, outputs, batch, create_graph=False)
        return used, _empirical(loss, outputs, batch, slopes, weighting)

    def attached(loss: Loss, outputs: Tree, batch: Any) -> OnOutputs:
        weighting = reduction(loss, outputs, batch)
        used, slopes = slopes_by_transforms(loss.criterion, outputs, batch)
        return used, _empirical(loss, outputs, batch, slopes, weighting)

    matrix = OutputMatrix(constant, attached)
    return through_outputs(loss, matrix, chunk_size, differentiable=differentiable)


def hessian_of_outputs(
    loss: Loss,
    outputs: Tree,
    batch: Any,
    *,
    try_convexity: bool = False,
    verified: Verified | None = None,
) -> OnOutputs:
    """Return B, the Hessian of the criterion with respect to the outputs."""
    if isinstance(loss.criterion, OfStates):
        return linear_head.gauss_newton(loss.criterion, outputs, loss.criterion.targets(batch))
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


def _attached_hessian(loss: Loss, outputs: Tree, batch: Any) -> OnOutputs:
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
