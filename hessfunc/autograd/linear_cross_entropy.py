"""Cross-entropy of a linear layer, computed for a few rows at a time.

The logits of a language model have one entry for each token and each word. Here, they exist only
for one chunk of tokens. Every derivative recomputes them from hidden states h ``[N, d]``, the
weight W ``[V, d]`` and the bias b ``[V]`` of the head, with u = h W' + b:

- The loss is a sum of l(u_n) over rows n. Its gradient r(u_n) gives dh = r W, dW = r' h and
  db = sum_n r_n.
- Tangents (a, B, c) of (h, W, b) move u by t = a W' + h B' + c, and r by R t, where R is the
  Hessian of l. The derivative of the gradient along them is (R t W + r B, (R t)' h + r' a,
  sum_n R t_n). It is symmetric, so the same formula serves forward and backward.
- A Gauss-Newton matrix replaces R, and omits the terms of r.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor

from hessfunc import options
from hessfunc.autograd.functorch import (
    applied,
    batched,
    on_blocks,
    once_more,
    probes_of,
    transforming,
)
from hessfunc.autograd.logits import Head, Rows
from hessfunc.autograd.matrices import has_faster, multiplied
from hessfunc.numerics import widened

# Gradient dh, dW and db with respect to hidden states, weight and bias, or tangents of these.
Parts: TypeAlias = tuple[Tensor | None, Tensor | None, Tensor | None]
# Whether each of them is needed.
Needed: TypeAlias = tuple[bool, bool, bool]
EVERY: Needed = (True, True, True)


@dataclass(frozen=True)
class Tokens:
    """Hidden states and head, with the targets.

    Attributes:
        head: Options of the loss.
        hidden: Hidden states h, ``[N, d]``.
        weight: Weight W, ``[V, d]``.
        bias: Bias b, ``[V]``, or None.
        targets: Targets, ``[N]``.
    """

    head: Head
    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    targets: Tensor

    def chunks(self) -> Iterator[tuple[slice, Rows]]:
        """Yield the slice of each chunk, and its rows."""
        weights = self.head.weights(self.targets)
        for chunk in self.head.chunks(self.hidden, self.weight):
            u = widened(_times(self.hidden[chunk], self.weight.mT))
            u = u if self.bias is None else u + self.bias
            yield chunk, Rows(self.head, u, self.targets[chunk], weights[chunk, None].to(u.dtype))

    def value(self) -> Tensor:
        """Return the loss."""
        return torch.stack([rows.losses() for _, rows in self.chunks()]).sum()

    def gradient(self, needed: Needed = EVERY, /) -> Parts:
        """Return the gradient with respect to hidden states, weight and bias."""
        return self.pulled(((chunk, rows.gradient()) for chunk, rows in self.chunks()), needed)

    def pushed(self, tangents: Parts, chunk: slice, /) -> Tensor:
        """Return t = a W' + h B' + c for a chunk of rows."""
        a, b, c = tangents
        terms = [
            None if a is None else widened(_times(a[chunk], self.weight.mT)),
            None if b is None else widened(_times(self.hidden[chunk], b.mT)),
            None if c is None else widened(c).repeat(len(self.targets[chunk]), 1),
        ]
        return functools.reduce(_plus, [term for term in terms if term is not None])

    def pulled(
        self, cotangents: Iterable[tuple[slice, Tensor]], needed: Needed = EVERY, /
    ) -> Parts:
        """Return the transpose of `pushed`: cotangents g of u give (g W, g' h, sum_n g_n)."""
        of_hidden: list[Tensor] = []
        of_weight = of_bias = None
        for chunk, g in cotangents:
            narrow = g.to(self.weight.dtype)
            if needed[0]:
                of_hidden.append(_times(narrow, self.weight))
            if needed[1]:
                of_weight = _plus(of_weight, _times(narrow.mT, self.hidden[chunk]))
            if needed[2] and self.bias is not None:
                of_bias = _plus(of_bias, g.sum(0).to(self.bias.dtype))
        return torch.cat(of_hidden) if of_hidden else None, of_weight, of_bias

    def second_derivatives(self, tangents: Sequence[Parts], needed: Needed, /) -> list[Parts]:
        """Return the derivative of the gradient along each tangent."""
        of_hidden: list[list[Tensor]] = [[] for _ in tangents]
        totals: list[tuple[Tensor | None, Tensor | None]] = [(None, None) for _ in tangents]
        for chunk, rows in self.chunks():
            gradient, hessian = rows.gradient().to(self.weight.dtype), rows.hessian()
            for i, (a, b, c) in enumerate(tangents):
                g = hessian(self.pushed((a, b, c), chunk))
                moved, of_weight, of_bias = self.pulled([(chunk, g)], needed)
                if moved is not None:
                    moved = moved if b is None else _plus(moved, _times(gradient, b))
                    of_hidden[i].append(moved)
                if needed[1] and a is not None:
                    of_weight = _plus(of_weight, _times(gradient.mT, a[chunk]))
                weights, biases = totals[i]
                totals[i] = _plus(weights, of_weight), _plus(biases, of_bias)
        return [
            (torch.cat(h) if h else None, w, b) for h, (w, b) in zip(of_hidden, totals, strict=True)
        ]


@options.validated(
    hidden=options.tensor,
    weight=options.tensor,
    targets=options.tensor,
    bias=options.tensor,
    scale=options.finite,
    softcap=options.finite,
    label_smoothing=options.finite,
    reduction=options.text,
)
def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    /,
    *,
    bias: Tensor | None = None,
    scale: float = 1.0,
    softcap: float | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    reduction: Literal["mean", "sum"] = "mean",
    rows_per_chunk: int | None = None,
) -> Tensor:
    """Return the cross-entropy of a linear layer without keeping its logits.

        mean over n of -log softmax(z_n)[y_n],   z = cap(scale (h W' + b))

    The value, gradient and Hessian products compute the logits of a few rows at a time, and
    recompute them in each product. Inside transforms of torch.func, in forward mode and inside
    `torch.compile`, all logits exist at once.

    Examples:
        >>> hidden, weight, targets = torch.randn(6, 4), torch.randn(9, 4), torch.arange(6)
        >>> whole = torch.nn.functional.cross_entropy(hidden @ weight.T, targets)
        >>> torch.allclose(hf.linear_cross_entropy(hidden, weight, targets), whole, atol=1e-5)
        True

    Args:
        hidden: Hidden states h, ``[..., d]``.
        weight: Weight W of the layer, ``[V, d]``.
        targets: Classes y, integers of shape ``[...]``.
        bias: Bias b of the layer, ``[V]``.
        scale: Factor of the logits.
        softcap: Bound c of the logits, cap(z) = c tanh(z / c); None for no bound.
        ignore_index: Target of rows that do not count.
        label_smoothing: Weight of the uniform distribution in the target distribution.
        reduction: Mean or sum over the rows that count.
        rows_per_chunk: Number of rows whose logits exist at once; None for at most 2^22 logits.

    Raises:
        ValueError: If the shapes do not fit, or if targets are not integers.

    Cost: memory for 2^22 logits besides the gradient. A gradient takes 4/3 of the matrix products
    of a graph with logits, a Hessian product 7/6.

    Source: Hsu et al. 2024, arXiv 2410.10989, for the gradient.
    """
    head = Head(scale, softcap, ignore_index, label_smoothing, reduction, rows_per_chunk)
    return loss_of(head, hidden, weight, bias, targets)


def loss_of(
    head: Head, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, /
) -> Tensor:
    """Return the loss of hidden states ``[..., d]`` and targets ``[...]``."""
    _refuse_shapes(hidden, weight, bias, targets)
    rows, flat = counted(head, hidden, targets)
    if transforming():
        # Transforms need torch's own operations, and recomputing saves them no memory.
        return Tokens(replace(head, rows_per_chunk=len(rows)), rows, weight, bias, flat).value()
    return _Value.apply(head, rows, weight, bias, flat)  # type: ignore[no-untyped-call]


def counted(head: Head, hidden: Tensor, targets: Tensor, /) -> tuple[Tensor, Tensor]:
    """Return rows ``[N, d]`` and targets ``[N]``; the rows that do not count are zero."""
    rows, flat = hidden.reshape(-1, hidden.shape[-1]), targets.reshape(-1).long()
    # Padding may have hidden states that are not finite.
    return rows.masked_fill((flat == head.ignore_index)[:, None], 0.0), flat


class _Value(torch.autograd.Function):
    """Loss of hidden states, weight and bias."""

    @staticmethod
    def forward(
        ctx: Any, head: Head, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor
    ) -> Tensor:
        ctx.save_for_backward(hidden, weight, bias, targets)
        ctx.head = head
        return Tokens(head, hidden, weight, bias, targets).value().to(hidden.dtype)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Any, ...]:
        *tensors, targets = ctx.saved_tensors
        needed = ctx.needs_input_grad[1:4]
        if torch.is_grad_enabled() and not batched(g):
            moving = once_more(*tensors)
            parts = _Gradient.apply(ctx.head, needed, g, *moving, targets)  # type: ignore[no-untyped-call]
        else:
            hidden, weight, bias = tensors
            gradient = Tokens(ctx.head, hidden, weight, bias, targets).gradient(needed)
            parts = [None if part is None else _scaled(part, g) for part in gradient]
        return None, *parts, None


class _Gradient(torch.autograd.Function):
    """Gradient of the loss times a number g."""

    @staticmethod
    def forward(
        ctx: Any,
        head: Head,
        needed: Needed,
        g: Tensor,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
    ) -> Parts:
        ctx.save_for_backward(g, hidden, weight, bias, targets)
        ctx.head, ctx.needed = head, needed
        ctx.set_materialize_grads(False)
        parts = Tokens(head, hidden, weight, bias, targets).gradient(needed)
        of_hidden, of_weight, of_bias = (None if part is None else g * part for part in parts)
        return of_hidden, of_weight, of_bias

    @staticmethod
    def backward(ctx: Any, *tangents: Tensor | None) -> tuple[Any, ...]:
        g, *tensors, targets = ctx.saved_tensors
        hidden, weight, bias = tensors
        tokens = Tokens(ctx.head, hidden, weight, bias, targets)
        needs_g, *needed = ctx.needs_input_grad[2:6]

        def along(a: Tensor | None, b: Tensor | None, c: Tensor | None) -> tuple[Any, ...]:
            blocks = probes_of((a, b, c), tensors)
            parts = tokens.second_derivatives(blocks or [(a, b, c)], tuple(needed))
            scaled = [[None if x is None else g * x for x in part] for part in parts]
            return tuple(
                columns[0] if not blocks or columns[0] is None else torch.stack(columns)
                for columns in zip(*scaled, strict=True)
            )

        of_g = None
        if needs_g:
            gradient = tokens.gradient(ctx.needed)
            pairs = zip(gradient, tangents, strict=True)
            of_g = sum((x * y).sum() for x, y in pairs if x is not None and y is not None)
        return None, None, of_g, *applied(along, *tangents), None


def _scaled(part: Tensor, g: Tensor) -> Tensor:
    """Return g times a part of the gradient, for a number or a block of numbers g."""
    return on_blocks(lambda numbers: numbers.view(*numbers.shape, *[1] * part.dim()) * part, g)


def _plus(total: Tensor | None, other: Tensor | None) -> Any:
    """Return a sum whose terms may be missing, in place unless autograd records it."""
    if total is None or other is None:
        return other if total is None else total
    return total + other if torch.is_grad_enabled() else total.add_(other)


def _times(a: Tensor, b: Tensor) -> Tensor:
    """Return ``a @ b`` by the library that is fastest on the processor."""
    return multiplied(a, b) if has_faster(a) else a @ b


def _refuse_shapes(hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor) -> None:
    """Raise ValueError unless the shapes belong to a linear layer and its targets."""
    if hidden.dtype != weight.dtype or (bias is not None and bias.dtype != weight.dtype):
        raise TypeError(
            f"hidden states are {hidden.dtype}, but the weight is {weight.dtype}: cast them to one "
            "dtype, outside of autocast"
        )
    is_integer = not (targets.is_floating_point() or targets.is_complex())
    if not is_integer or targets.dtype == torch.bool or targets.shape != hidden.shape[:-1]:
        raise ValueError(
            f"targets have dtype {targets.dtype} and shape {tuple(targets.shape)}, but hidden "
            f"states of shape {tuple(hidden.shape)} need one integer class for each row, "
            f"{tuple(hidden.shape[:-1])}: use `torch.nn.functional.cross_entropy` for others"
        )
    if not targets.numel():
        raise ValueError("there are no targets, over which the loss could be a mean or a sum")
    fits = weight.dim() == 2 and weight.shape[1] == hidden.shape[-1]
    if not fits or (bias is not None and bias.shape != weight.shape[:1]):
        of_bias = "" if bias is None else f" and a bias of shape {tuple(bias.shape)}"
        raise ValueError(
            f"a weight of shape {tuple(weight.shape)}{of_bias} is not the linear layer of hidden "
            f"states of shape {tuple(hidden.shape)}: pass the weight as (classes, features)"
        )
