"""Bilinear maps of activations and weights: convolutions, linear layers, scales of channels.

A bilinear map B and its transposes satisfy <g, B(x, w)> = <x, left(g, w)> = <w, right(g, x)>. With
the cotangent g of y = B(x, w), the gradient is dx = left(g, w) and dw = right(g, x). The derivative
of each of the three maps consists of the other two, so the second derivative of a layer needs no
further maps. A Hessian product takes six of them, a gradient three.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hessfunc.autograd.functorch import applied, batched, once_more


class Bilinear(ABC):
    """Bilinear map B and its transposes.

    In each call, one argument may be a block with a leading probe axis. The result is then a block
    too. In grad mode, all methods consist of functions that torch differentiates.
    """

    @abstractmethod
    def out(self, x: Tensor, w: Tensor, /) -> Tensor:
        """Return B(x, w)."""

    @abstractmethod
    def left(self, g: Tensor, w: Tensor, /) -> Tensor:
        """Transpose in the first argument: the dx with <dx, x> = <g, B(x, w)>."""

    @abstractmethod
    def right(self, g: Tensor, x: Tensor, /) -> Tensor:
        """Transpose in the second argument: the dw with <dw, w> = <g, B(x, w)>."""

    @property
    @abstractmethod
    def dims(self) -> int:
        """Number of axes of y; the bias belongs to the second axis."""

    def spread(self, b: Tensor, /) -> Tensor:
        """Return a bias, or a block of biases, in the shape in which it is added to y."""
        return b.view(*b.shape[:-1], 1, -1, *[1] * (self.dims - 2))

    def gathered(self, g: Tensor, /) -> Tensor:
        """Transpose of `spread`: sum g over all axes except the second."""
        return g.sum((-self.dims, *range(2 - self.dims, 0)))

    def tangent(self, x: Tensor, w: Tensor, dx: Tensor, dw: Tensor, /) -> Tensor:
        """Return the tangent B(dx, w) + B(x, dw); dx and dw may be blocks."""
        return _plus(self.out(dx, w), self.out(x, dw))


def affine(
    form: Bilinear,
    x: Tensor,
    w: Tensor,
    b: Tensor | None,
    /,
    *,
    value: Tensor | None = None,
) -> Tensor:
    """Return B(x, w) + b, with derivatives of every order.

    Args:
        form: Bilinear map B.
        x: Activations.
        w: Weights.
        b: Bias.
        value: Value of the result, if it is known already.
    """
    # autograd.Function returns a tensor argument as a view, which forbids in-place changes. The
    # list hides the tensor.
    known = [] if value is None else [value]
    return _Affine.apply(form, x, w, b, known)  # type: ignore[no-untyped-call]


def _plus(total: Tensor, other: Tensor) -> Tensor:
    """Return the sum, in place unless only the second term is a block."""
    return total.add_(other) if total.dim() >= other.dim() else total + other


class _Affine(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, form: Bilinear, x: Tensor, w: Tensor, b: Tensor | None, known: list[Tensor]
    ) -> Tensor:
        _, of_x, of_w, *_ = ctx.needs_input_grad
        ctx.save_for_backward(x if of_w else None, w if of_x else None)
        ctx.form = form
        if known:
            return known[0]
        y = form.out(x, w)
        return y if b is None else y.add_(form.spread(b))

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Any, ...]:
        x, w = ctx.saved_tensors
        form, needed = ctx.form, ctx.needs_input_grad[1:4]
        if torch.is_grad_enabled() and not batched(g):
            gradients = _Transposes.apply(form, g, *once_more(x, w), needed[2])  # type: ignore[no-untyped-call]
        else:
            # vmap would pass its wrapped tensors to a Function without a vmap rule.
            gradients = (
                applied(form.left, g, w) if needed[0] else None,
                applied(form.right, g, x) if needed[1] else None,
                applied(form.gathered, g) if needed[2] else None,
            )
        return None, *gradients, None


class _Transposes(torch.autograd.Function):
    """Gradients (left(g, w), right(g, x), gathered(g)) that are needed; the others are None."""

    @staticmethod
    def forward(
        ctx: Any, form: Bilinear, g: Tensor, x: Tensor | None, w: Tensor | None, biased: bool
    ) -> tuple[Tensor | None, ...]:
        of_g, of_x, of_w = ctx.needs_input_grad[1:4]
        ctx.save_for_backward(g if of_x or of_w else None, *((x, w) if of_g else (None, None)))
        ctx.form, ctx.shape = form, g.shape
        ctx.set_materialize_grads(False)
        return (
            form.left(g, w) if w is not None else None,
            form.right(g, x) if x is not None else None,
            form.gathered(g) if biased else None,
        )

    @staticmethod
    def backward(
        ctx: Any, dx: Tensor | None, dw: Tensor | None, db: Tensor | None
    ) -> tuple[Any, ...]:
        # The cotangents dx, dw, db act as tangents of x, w, b:
        # <dx, left(g, w)> + <dw, right(g, x)> + <db, gathered(g)>
        #   = <g, B(dx, w) + B(x, dw) + spread(db)>,
        # whose derivatives by g, x and w are the bracket, left(g, dw) and right(g, dx).
        g, x, w = ctx.saved_tensors
        form = ctx.form
        _, needs_g, needs_x, needs_w = ctx.needs_input_grad[:4]
        moved = _moved(form, ctx.shape)
        of_g = applied(moved, x, w, dx, dw, db) if needs_g else None
        of_x = applied(form.left, g, dw) if needs_x and dw is not None else None
        of_w = applied(form.right, g, dx) if needs_w and dx is not None else None
        return None, of_g, of_x, of_w, None


def _moved(form: Bilinear, shape: torch.Size) -> Callable[..., Tensor]:
    """Return a function that computes the tangent of y from the given tangents of x, w and b.

    Args:
        form: Bilinear map B.
        shape: Shape of y.
    """

    def moved(
        x: Tensor, w: Tensor, dx: Tensor | None, dw: Tensor | None, db: Tensor | None
    ) -> Tensor:
        if dx is not None and dw is not None:
            tangent = form.tangent(x, w, dx, dw)
        elif dx is not None:
            tangent = form.out(dx, w)
        elif dw is not None:
            tangent = form.out(x, dw)
        else:
            assert db is not None
            spread = form.spread(db)
            return spread.expand(*spread.shape[: spread.dim() - len(shape)], *shape)
        return tangent if db is None else _plus(tangent, form.spread(db))

    return moved


@dataclass(frozen=True)
class Channels(Bilinear):
    """Scaling of channels: y is x with channel c of the second axis multiplied by w_c.

    Attributes:
        axes: Number of axes of x.
    """

    axes: int

    @property
    def dims(self) -> int:
        return self.axes

    def out(self, x: Tensor, w: Tensor, /) -> Tensor:
        return x * self.spread(w)

    def left(self, g: Tensor, w: Tensor, /) -> Tensor:
        return g * self.spread(w)

    def right(self, g: Tensor, x: Tensor, /) -> Tensor:
        return self.gathered(g * x)
