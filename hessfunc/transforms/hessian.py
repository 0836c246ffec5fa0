"""Hessian of a loss."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor

from hessfunc.autograd import differentiable_twice, rereading
from hessfunc.autograd.constant_matrix import Product, leaves_of_graph
from hessfunc.autograd.constants import Constants
from hessfunc.autograd.contexts import Precision
from hessfunc.autograd.custom_functions import Verified, refuse_if_cut, refuse_unless_derivatives
from hessfunc.autograd.errors import lacks_forward_mode
from hessfunc.autograd.forward_mode import DIFFERENCES, FORWARD, must_record, pulled_once
from hessfunc.autograd.functorch import edges, evaluating, final_gradient, pullback, transforming
from hessfunc.autograd.overrides import Replaced
from hessfunc.autograd.second_order import SECOND_ORDER
from hessfunc.losses import LossFunction, refuse_module
from hessfunc.options import validated
from hessfunc.spaces.of import space_of
from hessfunc.spaces.space import Space
from hessfunc.transforms.batches.reductions import noted
from hessfunc.transforms.chunks import Chunks, ChunkSize, Curvature
from hessfunc.transforms.differentiable import (
    Linearisation,
    Rebuild,
    differentiable_matvec,
    every_order,
    pullback_with_graph,
    refuse_untransformable,
)
from hessfunc.transforms.evaluation import checked, gradient_of, linearising, scalar
from hessfunc.transforms.own_rows import part_of
from hessfunc.trees import Matvec, Tree

Gradient: TypeAlias = Callable[[Sequence[Tensor]], Sequence[Tensor]]
Mode = Literal["reverse", "forward", "difference", "auto"]


@validated
def hvp(
    loss: LossFunction,
    /,
    *,
    mode: Mode = "auto",
    chunk_size: ChunkSize = None,
    differentiable: bool = False,
) -> Curvature:
    """Return the Hessian of a loss as a curvature function ``(params, batch) -> matvec``.

    With the gradient g of the loss, a product is

        H v = d/dt g(params + t v) at t = 0.

    Randomness in the loss, such as dropout in train mode, is drawn once from a fixed seed and is
    the same for every product. Attention uses an implementation that has a second derivative. If
    params are DTensors, the vectors are DTensors as well. They are multiplied one by one, in mode
    reverse or difference.

    All modes give the matrix of autograd, in which detached values and values computed under
    ``no_grad`` are constant. The matvec copies params and batch when it is made, so that later
    writes through ``.data`` or NumPy, which torch does not detect, do not change it. The copy of a
    batch is small compared to the activations in the graph. Frozen parameters are not copied; see
    `functional`.

    Examples:
        >>> loss = lambda w, x: (w[0] ** 2 * w[1] * x).sum()
        >>> w = torch.tensor([1.0, 2.0], dtype=torch.float64)
        >>> matvec = hf.hvp(loss)(w, torch.ones(1, dtype=torch.float64))
        >>> matvec(torch.eye(2, dtype=torch.float64))  # a block of two vectors
        tensor([[4., 2.],
                [2., 0.]], dtype=torch.float64)

    Args:
        loss: Pure loss ``(params, batch) -> scalar``.
        mode: Method for the products.
            ``"reverse"``: Backward pass through the kept graph of the gradient. The loss is
            evaluated once. A product costs one such pass, 2 gradients on a deep net.
            ``"forward"``: Forward-mode derivative of the gradient. No graph is kept, and each
            call evaluates the loss again.
            ``"difference"``: Finite difference (g(params + t v) - g(params - t v)) / 2t with
            t = eps^(1/3) |params| / |v|. It costs 2 gradients and works for any loss with a
            gradient. For smooth losses, it is accurate to about 1e-9 in float64 and 1e-4 in
            float32. With kinks (ReLU, max-pooling), float32 is not reliable, because the step
            crosses them. A loss that computes in half precision is refused.
            ``"auto"``: Reverse, or forward if the graph does not fit on the GPU.
        chunk_size: Number of vectors of a block that go through one pass by vmap; 1 is a loop.
            None follows a fixed rule. If the operations of a product are small, the whole block is
            one chunk; if they are large, the block is multiplied by a loop. `tune` measures a
            chunk size instead.
        differentiable: Whether products carry the graph of params and batch, so that autograd
            differentiates them. By default, products carry only the graph of the vectors, and
            differentiating a product with respect to params or batch raises an error. Under the
            transforms of `torch.func`, products can always be differentiated.

    Raises:
        TypeError: If ``loss`` is an ``nn.Module``.
        ValueError: If the loss is not a finite scalar that depends on params; raised by the
            curvature function.
        NotImplementedError: If an operation has no second derivative, or if autograd would lose
            one, in a custom function whose backward detaches or leaves torch; raised by the
            curvature function or the matvec.
        RuntimeError: If params have changed in place since the matvec was made, or if autocast is
            enabled; raised by the matvec.

    Cost: one gradient with its graph to linearise the loss. If the loss has custom autograd
    functions, the first matvec of each `hvp` checks them: one more evaluation of the loss, and nine
    gradients of one call of each function. Hooks on tensors add one gradient and its derivative.

    Source: Pearlmutter 1994, Fast exact multiplication by the Hessian.
    """
    refuse_module(loss)
    if mode not in ("reverse", "forward", "difference", "auto"):
        raise ValueError(f"mode={mode!r}: choose 'reverse', 'forward', 'difference' or 'auto'")
    if differentiable and mode in ("forward", "difference"):
        raise ValueError(f"mode={mode!r} keeps no graph: use mode='reverse' to differentiate it")
    chunks = Chunks(chunk_size)
    verified: Verified = set()

    def curvature(params: Tree, batch: Any) -> Matvec:
        if differentiable or transforming():
            with noted(loss, params, batch):
                return differentiable_matvec(
                    _Hessian(loss, verified), params, batch, chunk_size=chunk_size
                )
        part = part_of(loss, params, batch)
        with linearising(loss, part.space, params, batch) as at:
            rows = part.rows(at.batch)
            problem = _Problem(part.weighted, part.space, at.copies, rows, verified)
            product, again = _made(problem, mode)
        size = Chunks(1) if mode == "difference" else chunks
        return at.matvec(product, chunks=size, again=again, others=problem.others)

    return curvature


@dataclass(frozen=True)
class _Problem:
    """Loss at a point.

    Attributes:
        loss: Loss ``(params, batch) -> scalar``.
        space: Space of the parameters.
        point: Leaves of the parameters.
        batch: Batch.
        verified: Custom functions that have been verified.
        others: Leaves of the graph of the loss besides the parameters; added by `refuse_if_cut`.
    """

    loss: LossFunction
    space: Space
    point: Sequence[Tensor]
    batch: Any
    verified: Verified
    others: list[Tensor] = field(default_factory=list)

    def value(self, leaves: Sequence[Tensor]) -> Tensor:
        """Return the loss at these leaves, after checking it."""
        return checked(self.loss(self.space.tree(leaves), self.batch), self.space, leaves)

    def inputs(self) -> list[Tensor]:
        """Return new leaves at the point that require a gradient."""
        return [leaf.detach().requires_grad_() for leaf in self.point]

    def refuse_if_cut(self, value: Tensor, inputs: Sequence[Tensor], seen: Replaced) -> None:
        """Raise if autograd cannot differentiate the gradient of the loss."""
        refuse_if_cut(
            [value],
            inputs,
            lambda leaves: [self.value(leaves)],
            hooks=tuple(seen.hooks),
            verified=self.verified,
        )
        self.others[:] = leaves_of_graph([value], inputs)


@dataclass(frozen=True)
class _Hessian(Linearisation):
    """Differentiable Hessian of a loss.

    Attributes:
        loss: Loss ``(params, batch) -> scalar``.
        verified: Custom functions that have been verified.
    """

    loss: LossFunction
    verified: Verified

    def by_transforms(self, rebuild: Rebuild, point: Sequence[Tensor], batch: Any, /) -> Product:
        def value(*leaves: Tensor) -> Tensor:
            with every_order(leaves[0].device):
                of_loss = scalar(self.loss(rebuild(leaves), batch))
            refuse_untransformable(of_loss)
            return of_loss

        # The pullback of the gradient maps v to H'v, and H' = H.
        gradient = torch.func.grad(value, argnums=tuple(range(len(point))))
        pulled = torch.func.vjp(gradient, *point)[1]
        return lambda tangents: pulled(tuple(tangents))

    def by_autograd(self, rebuild: Rebuild, point: Sequence[Tensor], batch: Any, /) -> Product:
        problem = _Problem(self.loss, space_of(rebuild(point)), point, batch, self.verified)
        with every_order(problem.space.device) as seen:
            value = problem.value(point)
            problem.refuse_if_cut(value, point, seen)
            gradient = gradient_of(value, point, create_graph=True)
        curved = [i for i, g in enumerate(gradient) if g.requires_grad]
        pulled = pullback_with_graph([gradient[i] for i in curved], point)
        return lambda tangents: pulled([tangents[i] for i in curved])


def _made(problem: _Problem, mode: Mode) -> tuple[Product, bool]:
    """Return the product of a mode, and whether it evaluates the loss again for each vector."""
    if mode == "difference":
        return _difference(problem), True
    if mode == "forward":
        return _forward(problem), True
    try:
        return _reverse(problem), False
    except torch.OutOfMemoryError:
        if mode == "reverse":
            raise
        torch.cuda.empty_cache()
    # Outside of the handler, which would keep the memory of the graph alive.
    return _forward(problem), True


def _reverse(problem: _Problem) -> Product:
    inputs = problem.inputs()
    with differentiable_twice(problem.space.device, SECOND_ORDER) as seen:
        value = problem.value(inputs)
        problem.refuse_if_cut(value, inputs, seen)
        with final_gradient():
            gradient = gradient_of(value, inputs, create_graph=True)
    # The pullback of the gradient maps v to H'v, and H' = H.
    curved = [i for i, g in enumerate(gradient) if g.requires_grad]
    # Edges of the graph suffice, so that the values of the gradient can be freed.
    pulled = pullback(edges([gradient[i] for i in curved]), inputs)
    return lambda tangents: pulled([tangents[i] for i in curved])


def _forward(problem: _Problem) -> Product:
    space, point = problem.space, problem.point
    if space.distributed:
        raise NotImplementedError(
            "DTensors have no forward mode: use `hvp(loss, mode='reverse')`. If its graph does not "
            "fit in memory, use `microbatches(batch, size)`, or `hvp(loss, mode='difference')`"
        )

    def value(*leaves: Tensor) -> Tensor:
        with evaluating():
            return problem.loss(space.tree(leaves), problem.batch)

    inputs = problem.inputs()
    with rereading(problem.batch), differentiable_twice(space.device, FORWARD) as seen:
        first = problem.value(inputs)
        problem.refuse_if_cut(first, inputs, seen)
        recording = must_record([first])
        gradient_of(first, inputs, create_graph=False)

    def freed(*leaves: Tensor) -> tuple[Tensor, ...]:
        of_loss, pulled = torch.func.vjp(value, *leaves)[:2]
        return pulled_once(pulled, torch.ones_like(of_loss))

    recorded = torch.func.grad(value, argnums=tuple(range(len(point))))
    gradient: Callable[..., Sequence[Tensor]] = recorded if recording else freed

    def along(tangents: Sequence[Tensor]) -> Sequence[Tensor]:
        with differentiable_twice(space.device, FORWARD):
            products: Sequence[Tensor] = torch.func.jvp(gradient, tuple(point), tuple(tangents))[1]
            return products

    def product(tangents: Sequence[Tensor]) -> Sequence[Tensor]:
        nonlocal gradient
        try:
            products = along(tangents)
        except RuntimeError as error:
            if lacks_forward_mode(error) is None:
                raise
            # Group norm and others have a forward derivative only if their backward is recorded.
            gradient = recorded
            products = with_forward_mode(tangents)
        return [out.detach() for out in products]

    def with_forward_mode(tangents: Sequence[Tensor]) -> Sequence[Tensor]:
        try:
            return along(tangents)
        except RuntimeError as error:
            operation = lacks_forward_mode(error)
            if operation is not None and not _has_reverse_mode(problem):
                raise NotImplementedError(
                    f"{operation} has no second derivative in torch, in forward or reverse mode: "
                    "replace the operation, or use `hvp(loss, mode='difference')`, finite "
                    "differences of the gradient, which need a smooth loss and are most accurate "
                    "in float64"
                ) from error
            raise

    return product


def _has_reverse_mode(problem: _Problem) -> bool:
    """Return whether reverse mode can compute a product, for the advice in an error message."""
    try:
        _reverse(problem)([torch.zeros_like(leaf) for leaf in problem.point])
    except torch.OutOfMemoryError:
        return True
    except (RuntimeError, ValueError):
        return False
    return True


def _difference(problem: _Problem) -> Product:
    mode = Constants(DIFFERENCES)

    def gradient(inputs: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
        mode.start()
        with rereading(problem.batch), differentiable_twice(problem.space.device, mode):
            value = problem.value(inputs)
            mode.finish()
            with mode.suspended():
                return value, gradient_of(value, inputs, create_graph=False)

    def moved(at: Sequence[Tensor]) -> list[Tensor]:
        return gradient([leaf.detach().requires_grad_() for leaf in at])[1]

    inputs = problem.inputs()
    before = _memory(inputs)
    with Precision() as precision:
        value, _ = gradient(inputs)
    if before != _memory(inputs):
        raise NotImplementedError(
            "the loss writes into its parameters, as by `weight.clamp_()` under `no_grad`, so that "
            "finite differences would not follow autograd: use `hvp(loss, mode='reverse')`, or "
            "write into a copy, `weight.clamp(...)`"
        )
    _refuse_coarser(problem.space, precision)
    with differentiable_twice(problem.space.device, DIFFERENCES):
        refuse_unless_derivatives([value], inputs, lambda leaves: [problem.value(leaves)])
    return gradient_differences(moved, problem.space, problem.point)


def _memory(leaves: Sequence[Tensor]) -> list[tuple[int, int]]:
    """Return the version of each leaf, and the place of its entries; they change with a write."""
    return [
        (leaf._version, leaf.data_ptr() if type(leaf) is Tensor else 0)
        for leaf in leaves
        if not leaf.is_inference()
    ]


def _refuse_coarser(space: Space, precision: Precision) -> None:
    """Raise if a gradient is computed in half precision, and the parameters are in a finer one."""
    coarsest = max(space.dtypes, key=lambda dtype: torch.finfo(dtype).eps)
    eps = 0.0 if precision.dtype is None else torch.finfo(precision.dtype).eps
    if eps > max(torch.finfo(torch.float32).eps, torch.finfo(coarsest).eps):
        raise ValueError(
            f"the loss computes in {precision.dtype}, whose rounding hides finite differences of "
            f"the gradient: use `hvp(loss, mode='reverse')`, or compute it in {coarsest}"
        )


def gradient_differences(gradient: Gradient, space: Space, point: Sequence[Tensor]) -> Product:
    """Return the product with one vector as a central difference of a gradient."""
    # H v = (g(p + t v) - g(p - t v)) / 2t + O(t^2). The step |t v| = eps^(1/3) |p| balances this
    # error with the rounding error, of order eps / t.
    eps = max(torch.finfo(dtype).eps for dtype in space.dtypes)
    step = eps ** (1 / 3) * (_norm(space, point) or 1.0)

    def product(tangents: Sequence[Tensor]) -> Sequence[Tensor]:
        length = _norm(space, tangents)
        if length == 0:
            return [torch.zeros_like(t) for t in tangents]
        t = step / length
        ahead = gradient([p + t * v for p, v in zip(point, tangents, strict=True)])
        behind = gradient([p - t * v for p, v in zip(point, tangents, strict=True)])
        return [(a - b) / (2 * t) for a, b in zip(ahead, behind, strict=True)]

    return product


def _norm(space: Space, vector: Sequence[Tensor]) -> float:
    return float(space.norms(space.ravel_leaves([leaf[None] for leaf in vector])))
