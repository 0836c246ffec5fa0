"""Bilinear maps of activations and weights: convolutions, linear layers, scales of channels.

A bilinear map y = B(x, w) is one face of the trilinear form <g, B(x, w)>. The other two are its
transposes, left(g, w) = dx and right(g, x) = dw; and the derivative of each of the three is made
of the other two. So the second derivative of a layer needs no more than what its first needs: six
such maps a product where a gradient takes three.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hessfunc.transforms.kernels.probes import on_blocks

__all__ = ["Bilinear", "Layer", "affine"]


class Bilinear(ABC):
    """A bilinear map and its transposes.

    Each argument, one of a call at the most, may be a block, with a leading probe axis; then the
    result is one.
    """

    @abstractmethod
    def out(self, x: Tensor, w: Tensor, /) -> Tensor:
        """B(x, w)."""

    @abstractmethod
    def left(self, g: Tensor, w: Tensor, /) -> Tensor:
        """What is like x, and of which the inner product with x is <g, B(x, w)>."""

    @abstractmethod
    def right(self, g: Tensor, x: Tensor, /) -> Tensor:
        """What is like w, and of which the inner product with w is <g, B(x, w)>."""

    def tangent(self, x: Tensor, w: Tensor, dx: Tensor, dw: Tensor, /) -> Tensor:
        """B(dx, w) + B(x, dw), with dx and dw blocks, or neither."""
        return self.out(dx, w).add_(self.out(x, dw))


class Layer(Bilinear):
    """A bilinear map to which a bias may be added."""

    @abstractmethod
    def spread(self, b: Tensor, /) -> Tensor:
        """A vector of the weights' outputs, as it is added to y."""

    @abstractmethod
    def gathered(self, g: Tensor, /) -> Tensor:
        """The transpose of `spread`."""


def affine(
    form: Layer,
    x: Tensor,
    w: Tensor,
    b: Tensor | None,
    /,
    *,
    value: Tensor | None = None,
    twice: bool,
) -> Tensor:
    """B(x, w) + b, and its derivatives of every order.

    Args:
        form: B.
        x: the activations.
        w: the weights.
        b: the bias.
        value: the result, where it is known.
        twice: whether the gradient is to be differentiated with respect to x and w; without it
            the gradient's graph is linear in the cotangents alone, and smaller.
    """
    # An argument of autograd.Function that is returned becomes a view, not to be changed in place.
    known = [] if value is None else [value]
    return _Affine.apply(form, x, w, b, known, twice)  # type: ignore[no-untyped-call]


class _Affine(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        form: Layer,
        x: Tensor,
        w: Tensor,
        b: Tensor | None,
        known: list[Tensor],
        twice: bool,
    ) -> Tensor:
        ctx.save_for_backward(x, w)
        ctx.form, ctx.twice = form, twice
        if known:
            return known[0]
        found = form.out(x, w)
        return found if b is None else found.add_(form.spread(b))

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Any, ...]:
        x, w = ctx.saved_tensors
        form, needed = ctx.form, ctx.needs_input_grad[1:4]
        if torch.is_grad_enabled():
            if not ctx.twice:
                x, w = x.detach(), w.detach()
            found = _Transposes.apply(form, g, x, w, *needed)  # type: ignore[no-untyped-call]
        else:
            found = (
                on_blocks(form.left, g, w) if needed[0] else None,
                on_blocks(form.right, g, x) if needed[1] else None,
                on_blocks(form.gathered, g) if needed[2] else None,
            )
        return None, *found, None, None


class _Transposes(torch.autograd.Function):
    """The transposes of a form and of its bias, those that are needed."""

    @staticmethod
    def forward(
        ctx: Any, form: Layer, g: Tensor, x: Tensor, w: Tensor, *needed: bool
    ) -> tuple[Tensor | None, ...]:
        ctx.save_for_backward(g, x, w)
        ctx.form = form
        ctx.set_materialize_grads(False)
        return (
            form.left(g, w) if needed[0] else None,
            form.right(g, x) if needed[1] else None,
            form.gathered(g) if needed[2] else None,
        )

    @staticmethod
    def backward(
        ctx: Any, dx: Tensor | None, dw: Tensor | None, db: Tensor | None
    ) -> tuple[Any, ...]:
        g, x, w = ctx.saved_tensors
        form = ctx.form
        _, needs_g, needs_x, needs_w = ctx.needs_input_grad[:4]
        of_g = of_x = of_w = None
        if torch.is_grad_enabled():
            if needs_g:
                of_g = _sum(
                    None if dx is None else _product(form, dx, w),
                    None if dw is None else _product(form, x, dw),
                    None if db is None else form.spread(db).expand_as(g),
                )
            if needs_x and dw is not None:
                of_x = _product(_Left(form), g, dw)
            if needs_w and dx is not None:
                of_w = _product(_Right(form), g, dx)
        else:
            if needs_g:
                of_g = on_blocks(_moved(form, g.shape), x, w, dx, dw, db)
            if needs_x and dw is not None:
                of_x = on_blocks(form.left, g, dw)
            if needs_w and dx is not None:
                of_w = on_blocks(form.right, g, dx)
        return None, of_g, of_x, of_w, None, None, None


def _product(form: Bilinear, x: Tensor, w: Tensor) -> Tensor:
    return _Affine.apply(form, x, w, None, [], True)  # type: ignore[no-untyped-call]


def _sum(*terms: Tensor | None) -> Tensor | None:
    present = [term for term in terms if term is not None]
    return sum(present[1:], present[0]) if present else None


def _moved(form: Layer, shape: torch.Size) -> Callable[..., Tensor]:
    """The tangent of y, of a shape: from those of x, w and b that are there."""

    def moved(
        x: Tensor, w: Tensor, dx: Tensor | None, dw: Tensor | None, db: Tensor | None
    ) -> Tensor:
        if dx is not None and dw is not None:
            found = form.tangent(x, w, dx, dw)
        elif dx is not None:
            found = form.out(dx, w)
        elif dw is not None:
            found = form.out(x, dw)
        else:
            assert db is not None
            spread = form.spread(db)
            return spread.expand(*spread.shape[: spread.dim() - len(shape)], *shape)
        return found if db is None else found.add_(form.spread(db))

    return moved


@dataclass(frozen=True)
class _Left(Bilinear):
    """The left transpose of a form, itself a bilinear map (g, w) -> dx."""

    form: Bilinear

    def out(self, x: Tensor, w: Tensor, /) -> Tensor:
        return self.form.left(x, w)

    def left(self, g: Tensor, w: Tensor, /) -> Tensor:
        return self.form.out(g, w)

    def right(self, g: Tensor, x: Tensor, /) -> Tensor:
        return self.form.right(x, g)


@dataclass(frozen=True)
class _Right(Bilinear):
    """The right transpose of a form, itself a bilinear map (g, x) -> dw."""

    form: Bilinear

    def out(self, x: Tensor, w: Tensor, /) -> Tensor:
        return self.form.right(x, w)

    def left(self, g: Tensor, w: Tensor, /) -> Tensor:
        return self.form.out(w, g)

    def right(self, g: Tensor, x: Tensor, /) -> Tensor:
        return self.form.left(x, g)
