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

from hessfunc.autograd.functorch import batched, on_blocks, once_more


class Bilinear(ABC):
    """A bilinear map and its transposes.

    Each argument, one of a call at the most, may be a block, with a leading probe axis; then the
    result is one. In grad mode all are of functions that torch differentiates.
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

    @property
    @abstractmethod
    def dims(self) -> int:
        """The axes of y, the second of which is that of the bias."""

    def spread(self, b: Tensor, /) -> Tensor:
        """A bias, as it is added to y."""
        return b.view(*b.shape[:-1], 1, -1, *[1] * (self.dims - 2))

    def gathered(self, g: Tensor, /) -> Tensor:
        """The transpose of `spread`."""
        return g.sum((-self.dims, *range(2 - self.dims, 0)))

    def tangent(self, x: Tensor, w: Tensor, dx: Tensor, dw: Tensor, /) -> Tensor:
        """B(dx, w) + B(x, dw); dx and dw may be blocks."""
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
    """B(x, w) + b, and its derivatives of every order.

    Args:
        form: B.
        x: the activations.
        w: the weights.
        b: the bias.
        value: the result, where it is known.
    """
    # An argument of autograd.Function that is returned becomes a view, not to be changed in place.
    known = [] if value is None else [value]
    return _Affine.apply(form, x, w, b, known)  # type: ignore[no-untyped-call]


def _plus(found: Tensor, other: Tensor) -> Tensor:
    """The sum, in place where the first is as large: one of them alone may be a block."""
    return found.add_(other) if found.dim() >= other.dim() else found + other


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
        found = form.out(x, w)
        return found if b is None else found.add_(form.spread(b))

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Any, ...]:
        x, w = ctx.saved_tensors
        form, needed = ctx.form, ctx.needs_input_grad[1:4]
        if torch.is_grad_enabled() and not batched(g):
            found = _Transposes.apply(form, g, *once_more(x, w), needed[2])  # type: ignore[no-untyped-call]
        else:
            # A Function without a rule for vmap would be applied to what vmap has wrapped.
            run = _as_it_is if torch.is_grad_enabled() else on_blocks
            found = (
                run(form.left, g, w) if needed[0] else None,
                run(form.right, g, x) if needed[1] else None,
                run(form.gathered, g) if needed[2] else None,
            )
        return None, *found, None


class _Transposes(torch.autograd.Function):
    """The transposes of a form and of its bias, those that are needed."""

    @staticmethod
    def forward(
        ctx: Any, form: Bilinear, g: Tensor, x: Tensor | None, w: Tensor | None, biased: bool
    ) -> tuple[Tensor | None, ...]:
        ctx.save_for_backward(g, x, w)
        ctx.form = form
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
        g, x, w = ctx.saved_tensors
        form = ctx.form
        _, needs_g, needs_x, needs_w = ctx.needs_input_grad[:4]
        # Derivatives of higher orders are those of torch's own functions.
        run = _as_it_is if torch.is_grad_enabled() else on_blocks
        moved = _moved(form, g.shape)
        of_g = run(moved, x, w, dx, dw, db) if needs_g else None
        of_x = run(form.left, g, dw) if needs_x and dw is not None else None
        of_w = run(form.right, g, dx) if needs_w and dx is not None else None
        return None, of_g, of_x, of_w, None


def _as_it_is(formula: Callable[..., Tensor], *tensors: Tensor | None) -> Tensor:
    return formula(*tensors)


def _moved(form: Bilinear, shape: torch.Size) -> Callable[..., Tensor]:
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
        return found if db is None else _plus(found, form.spread(db))

    return moved


@dataclass(frozen=True)
class Channels(Bilinear):
    """y = x with its channel c, of the second axis of ``axes``, times w_c."""

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
