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
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor

from hessfunc import options
from hessfunc.autograd.functorch import all_on_blocks, batched, on_blocks, once_more, transforming
from hessfunc.autograd.matrices import has_faster, multiplied
from hessfunc.numerics import wide_dtype

# Most logits that exist at once.
_ENTRIES = 2**22

# Gradient dh, dW and db with respect to hidden states, weight and bias, or tangents of these.
Parts: TypeAlias = tuple[Tensor | None, Tensor | None, Tensor | None]
# Whether each of them is needed.
Needed: TypeAlias = tuple[bool, bool, bool]
EVERY: Needed = (True, True, True)
# Product of a symmetric matrix on the logits u of some rows with tangents of u.
RowProduct: TypeAlias = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Head:
    """Options of the cross-entropy of z = cap(scale u), where u = h W' + b.

    Attributes:
        scale: Factor of the logits.
        softcap: Bound c of the logits, z = c tanh(scale u / c), or None for no bound.
        ignore_index: Target of rows that do not count.
        label_smoothing: Weight of the uniform distribution in the target distribution.
        reduction: Whether the loss is the mean or the sum over the rows that count.
        rows_per_chunk: Number of rows whose logits exist at once, or None for at most 2^22 logits.
    """

    scale: float = 1.0
    softcap: float | None = None
    ignore_index: int = -100
    label_smoothing: float = 0.0
    reduction: Literal["mean", "sum"] = "mean"
    rows_per_chunk: int | None = None

    def __post_init__(self) -> None:
        options.at_least(1, rows_per_chunk=self.rows_per_chunk)
        if self.reduction not in ("mean", "sum"):
            raise ValueError(f"reduction={self.reduction!r}: choose 'mean' or 'sum'")
        if self.softcap is not None and self.softcap <= 0:
            raise ValueError(f"softcap={self.softcap}: it must be positive, or None for no bound")
        if not 0 <= self.label_smoothing <= 1:
            raise ValueError(f"label_smoothing={self.label_smoothing}: it must be in [0, 1]")

    def logits(self, u: Tensor, /) -> Tensor:
        """Return the logits z."""
        z = u if self.scale == 1 else self.scale * u
        return z if self.softcap is None else self.softcap * torch.tanh(z / self.softcap)

    def weights(self, targets: Tensor, /) -> Tensor:
        """Return the weight of each row in the loss, in float64 where the device has it."""
        kept = (targets != self.ignore_index).to(wide_dtype(targets.device))
        return kept / kept.sum() if self.reduction == "mean" else kept

    def loss(
        self, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, /
    ) -> Tensor:
        """Return the loss of hidden states ``[..., d]`` and targets ``[...]``."""
        _refuse_shapes(hidden, weight, bias, targets)
        rows, flat = hidden.reshape(-1, hidden.shape[-1]), targets.reshape(-1)
        if transforming():
            # Transforms need torch's own operations, and recomputing saves them no memory.
            return Tokens(replace(self, rows_per_chunk=len(rows)), rows, weight, bias, flat).value()
        return _Value.apply(self, rows, weight, bias, flat)  # type: ignore[no-untyped-call]

    def chunks(self, hidden: Tensor, weight: Tensor, /) -> Sequence[slice]:
        """Return the slices of rows whose logits are computed together."""
        size = self.rows_per_chunk or max(1, _ENTRIES // len(weight))
        return [slice(i, i + size) for i in range(0, len(hidden), size)]


@dataclass(frozen=True)
class Rows:
    """Loss l(u) of a few rows with weights s, and its derivatives.

    With the softmax p of z = cap(u), the target distribution q and slopes cap', cap'':

        l = s <q, -log p>,   r = s (p - q) cap',   R t = s P (cap' t) cap' + s (p - q) cap'' t,

    where P x = p (x - <p, x>).

    Attributes:
        head: Options of the loss.
        u: Products h W' + b, ``[n, V]``.
        targets: Targets ``[n]``.
        weights: Weights s, ``[n, 1]``.
    """

    head: Head
    u: Tensor
    targets: Tensor
    weights: Tensor

    def losses(self) -> Tensor:
        """Return the sum of the losses."""
        z = self.head.logits(self.u)
        smoothing = self.head.label_smoothing
        aimed = (1 - smoothing) * z.gather(1, self._index) + smoothing * z.mean(1, keepdim=True)
        return (self.weights * (z.logsumexp(1, keepdim=True) - aimed)).sum()

    def gradient(self) -> Tensor:
        """Return r."""
        slope, _ = self._slopes()
        return self._residual() * slope

    def hessian(self) -> RowProduct:
        """Return the product with R."""
        slope, curvature = self._slopes()
        softmax = self._of_softmax(slope)
        if curvature is None:
            return softmax
        of_cap = self._residual() * curvature
        return lambda t: softmax(t) + of_cap * t

    def gauss_newton(self) -> RowProduct:
        """Return the product with the first term of R."""
        return self._of_softmax(self._slopes()[0])

    def sampled(self, drawn: Tensor, /) -> RowProduct:
        """Return the product with the mean of s (p - e_y) (p - e_y)' cap'^2 over drawn classes y.

        Args:
            drawn: Classes ``[n, S]``.
        """
        p, (slope, _) = self.probabilities, self._slopes()

        def product(t: Tensor) -> Tensor:
            moved = slope * t
            along = (moved * p).sum(1, keepdim=True) - moved.gather(1, drawn)
            along = along / drawn.shape[1]
            total = p * along.sum(1, keepdim=True)
            return total.scatter_add(1, drawn, -along) * self.weights * slope

        return product

    @functools.cached_property
    def probabilities(self) -> Tensor:
        """Softmax p."""
        return self.head.logits(self.u).softmax(1)

    @property
    def _index(self) -> Tensor:
        return self.targets.where(self.targets != self.head.ignore_index, 0)[:, None]

    def _residual(self) -> Tensor:
        """Return s (p - q)."""
        p, smoothing = self.probabilities, self.head.label_smoothing
        if smoothing:
            p = p - smoothing / p.shape[1]
        aimed = torch.full_like(self._index, smoothing - 1, dtype=p.dtype)
        return self.weights * p.scatter_add(1, self._index, aimed)

    def _of_softmax(self, slope: Tensor | float) -> RowProduct:
        """Return the product with s cap' P cap'."""
        p, factor = self.probabilities, self.weights * slope

        def product(t: Tensor) -> Tensor:
            moved = t if isinstance(slope, float) and slope == 1 else slope * t
            inner = torch.linalg.vecdot(p, moved)[:, None]
            if torch.is_grad_enabled():
                return factor * p * (moved - inner)
            # Logits are the peak of memory, and passes over them take the time.
            return (moved - inner).mul_(p).mul_(factor)

        return product

    def _slopes(self) -> tuple[Tensor | float, Tensor | None]:
        """Return the first and second derivative of cap; None for a second derivative of zero."""
        scale, cap = self.head.scale, self.head.softcap
        if cap is None:
            return float(scale), None
        tanh = torch.tanh(self.u * (scale / cap))
        slope = scale * (1 - tanh * tanh)
        return slope, (-2 * scale / cap) * tanh * slope


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
            u = _wide(_times(self.hidden[chunk], self.weight.mT))
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
            None if a is None else _wide(_times(a[chunk], self.weight.mT)),
            None if b is None else _wide(_times(self.hidden[chunk], b.mT)),
            None if c is None else c.repeat(len(self.targets[chunk]), 1),
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
    return head.loss(hidden, weight, bias, targets)


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
            blocks = _probes((a, b, c), tensors)
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
        # In grad mode, torch's own functions give the derivatives of higher orders.
        run = _as_it_is if torch.is_grad_enabled() else all_on_blocks
        return None, None, of_g, *run(along, *tangents), None


def _as_it_is(
    formula: Callable[..., tuple[Tensor | None, ...]], *tensors: Tensor | None
) -> tuple[Tensor | None, ...]:
    return formula(*tensors)


def _probes(block: Sequence[Tensor | None], alike: Sequence[Tensor | None]) -> list[Parts]:
    """Return the tangents of a block, or no tangents if none of them has a probe axis."""
    pairs = list(zip(block, alike, strict=True))
    sizes = [len(x) for x, y in pairs if x is not None and y is not None and x.dim() > y.dim()]
    return [
        tuple(  # type: ignore[misc]
            x if x is None or y is None or x.dim() == y.dim() else x[i] for x, y in pairs
        )
        for i in range(max(sizes, default=0))
    ]


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


def _wide(x: Tensor) -> Tensor:
    """Return x in the dtype of the softmax, float32 at least."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def _refuse_shapes(hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor) -> None:
    """Raise ValueError unless the shapes belong to a linear layer and its targets."""
    if targets.is_floating_point() or targets.shape != hidden.shape[:-1]:
        raise ValueError(
            f"targets have dtype {targets.dtype} and shape {tuple(targets.shape)}, but hidden "
            f"states of shape {tuple(hidden.shape)} need one integer class for each row, "
            f"{tuple(hidden.shape[:-1])}: use `torch.nn.functional.cross_entropy` for others"
        )
    fits = weight.dim() == 2 and weight.shape[1] == hidden.shape[-1]
    if not fits or (bias is not None and bias.shape != weight.shape[:1]):
        of_bias = "" if bias is None else f" and a bias of shape {tuple(bias.shape)}"
        raise ValueError(
            f"a weight of shape {tuple(weight.shape)}{of_bias} is not the linear layer of hidden "
            f"states of shape {tuple(hidden.shape)}: pass the weight as (classes, features)"
        )
