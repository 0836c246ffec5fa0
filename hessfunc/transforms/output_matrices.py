"""Curvature ``J' B J``: Jacobian J of the model's outputs, and a matrix B on the outputs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor

from hessfunc.autograd import differentiable_twice
from hessfunc.autograd.constant_matrix import Product, leaves_of_graph
from hessfunc.autograd.custom_functions import Verified, refuse_if_cut
from hessfunc.autograd.functorch import (
    edges,
    final_gradient,
    linear_in_cotangents,
    pullback,
    transforming,
)
from hessfunc.autograd.overrides import Replaced
from hessfunc.autograd.second_order import SECOND_ORDER
from hessfunc.containers import opened
from hessfunc.losses import Loss
from hessfunc.spaces.of import space_of
from hessfunc.spaces.space import Space
from hessfunc.transforms.batches.reductions import noted
from hessfunc.transforms.chunks import GAUSS_NEWTON_ENTRIES, Chunks, ChunkSize, Curvature
from hessfunc.transforms.differentiable import (
    Linearisation,
    Rebuild,
    differentiable_matvec,
    every_order,
    pullback_with_graph,
    refuse_untransformable,
)
from hessfunc.transforms.evaluation import checked, linearising, scalar
from hessfunc.transforms.linear_head import without_logits
from hessfunc.transforms.output_gradients import INDEPENDENT
from hessfunc.transforms.outputs import Rest, floating_part
from hessfunc.transforms.own_rows import part_of
from hessfunc.trees import Matvec, Tree

# Indices of the output leaves on which B acts, and the product of B with one vector.
OnOutputs: TypeAlias = tuple[list[int], Callable[[list[Tensor]], Sequence[Tensor]]]
_MatrixAt: TypeAlias = Callable[[Loss, Tree, Any], OnOutputs]


@dataclass(frozen=True)
class OutputMatrix:
    """Matrix B on the outputs of a model, as a function ``(loss, outputs, batch)``.

    Attributes:
        constant: B at fixed outputs.
        attached: B with the graph of the outputs and the batch.
        by_rows: Whether B of some rows of a batch depends on these rows alone.
    """

    constant: _MatrixAt
    attached: _MatrixAt
    by_rows: bool = True


def through_outputs(
    loss: Loss, matrix: OutputMatrix, chunk_size: ChunkSize, *, differentiable: bool
) -> Curvature:
    """Return ``J' B J`` as a function ``(params, batch) -> matvec``, for this matrix B.

    Raises:
        TypeError: If ``loss`` is a plain function without outputs and criterion.
    """
    refuse_without_halves(loss)
    chunks = Chunks(chunk_size, GAUSS_NEWTON_ENTRIES)
    verified: Verified = set()

    def curvature(params: Tree, batch: Any) -> Matvec:
        if differentiable or transforming():
            with noted(loss, params, batch):
                return differentiable_matvec(
                    _ThroughOutputs(loss, matrix, verified), params, batch, chunk_size=chunk_size
                )
        part = part_of(loss, params, batch, by_rows=matrix.by_rows)
        inner, space = without_logits(part.loss), part.space
        with (
            linearising(loss, space, params, batch) as at,
            differentiable_twice(space.device, SECOND_ORDER) as seen,
        ):
            inputs, rows = at.inputs(), part.rows(at.batch)
            ends, between = _ends(inner, matrix.constant, space, inputs, rows, seen, verified)
            others = leaves_of_graph(ends, inputs)
            product = linearised(inputs, ends, [end.shape for end in ends], part.scaled(between))
        return at.matvec(product, chunks=chunks, others=others)

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
    matrix: _MatrixAt,
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
class _ThroughOutputs(Linearisation):
    """Differentiable matrix ``J' B J``.

    Attributes:
        loss: Loss with outputs and criterion.
        matrix: Matrix B on the outputs.
        verified: Custom functions that have been verified.
    """

    loss: Loss
    matrix: OutputMatrix
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
        # J'w is linear in w. Hence the pullback of w -> J'w, here at w = 1, maps v to J v.
        zeros = [torch.zeros_like(end) for end in ends]
        pushed = torch.func.vjp(lambda *w: pulled(w), *[torch.ones_like(end) for end in ends])[1]
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
        cotangents = [torch.ones_like(end).detach().requires_grad_() for end in ends]
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
    # J'w is linear in w. Hence J v = d/dw <J'w, v> at any w; here w = 1, because the formulas of
    # some operations, such as logcumsumexp, take the logarithm of w.
    cotangents = [
        torch.ones((), dtype=inputs[0].dtype, device=inputs[0].device)
        .expand(shape)
        .requires_grad_()
        for shape in shapes
    ]
    with linear_in_cotangents(), final_gradient():
        slopes = torch.autograd.grad(
            ends, inputs, cotangents, create_graph=True, materialize_grads=True
        )
    moving = [i for i, g in enumerate(slopes) if g.requires_grad]
    # Edges of the graph suffice, so that the values of the gradients can be freed.
    pushed = pullback(edges([slopes[i] for i in moving]), cotangents)
    pulled = pullback(ends, inputs)
    return lambda tangents: pulled(between(pushed([tangents[i] for i in moving])))
