"""Cross-entropy of a few rows of logits, with closed forms of its derivatives."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from hessfunc import options
from hessfunc.numerics import wide_dtype

# Most logits that exist at once.
_ENTRIES = 2**22

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
        aimed = (1 - smoothing) * z.gather(1, self._index)
        if smoothing:
            # Without smoothing, a logit of minus infinity does not count.
            aimed = aimed + smoothing * z.mean(1, keepdim=True)
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
        slope, _ = self._slopes()
        product = mean_outer_product(self.probabilities, drawn, 1)
        return lambda t: product(slope * t) * self.weights * slope

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


def mean_outer_product(p: Tensor, drawn: Tensor, axis: int, /) -> RowProduct:
    """Return the product with the mean of (p - e_y) (p - e_y)' over drawn classes y.

    Args:
        p: Probabilities, with the classes along an axis.
        drawn: Drawn classes y_1, ..., y_S along this axis.
        axis: Axis of the classes.
    """

    def product(t: Tensor) -> Tensor:
        # With a_y = <p - e_y, t> / S, the sum of a_y (p - e_y) is p sum_y a_y - sum_y a_y e_y.
        along = (t * p).sum(axis, keepdim=True) - t.gather(axis, drawn)
        along = along / drawn.shape[axis]
        total = p * along.sum(axis, keepdim=True)
        return total.scatter_add(axis, drawn, -along)

    return product
