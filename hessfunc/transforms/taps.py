"""Nonlinear functions of a graph, with their curvature at the gradient that arrives there."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, cast

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, Node

Residual: TypeAlias = Literal["abs", "clip", "zero", "none"]
# Graph nodes of elementwise functions. Piecewise linear functions have no curvature.
ELEMENTWISE = {
    *("TanhBackward0", "SigmoidBackward0", "GeluBackward0", "SiluBackward0", "MishBackward0"),
    *("SoftplusBackward0", "EluBackward0", "CeluBackward0", "LogSigmoidBackward0"),
    *("HardswishBackward0", "ExpBackward0", "Expm1Backward0"),
    *("LogBackward0", "Log1PBackward0", "ErfBackward0"),
    *("SqrtBackward0", "RsqrtBackward0", "PowBackward0", "ReciprocalBackward0"),
    *("SinBackward0", "CosBackward0", "TanBackward0", "AtanBackward0"),
    *("SinhBackward0", "CoshBackward0", "AsinhBackward0"),
}
# Graph nodes of functions that act on each row of their input separately.
_SOFTMAX = {"SoftmaxBackward0", "SafeSoftmaxBackward0", "LogSoftmaxBackward0"}
_NORMALISATION = {
    *("NativeLayerNormBackward0", "NativeGroupNormBackward0", "NativeBatchNormBackward0"),
}
ROWWISE = _SOFTMAX | _NORMALISATION
# Longest row for which an eigendecomposition is computed.
_LONGEST_ROW = 4096
# Product nodes, with the indices of their two factors among the inputs of the node.
PRODUCTS = {
    "MulBackward0": (0, 1),
    **dict.fromkeys(("MmBackward0", "BmmBackward0"), (0, 1)),
    "AddmmBackward0": (1, 2),
}


@dataclass(frozen=True)
class _Rows:
    """Conversion of a tensor to rows ``(..., d)``, and back.

    Attributes:
        of: Function that returns the rows of a tensor.
        back: Function that returns the tensor of rows.
    """

    of: Callable[[Tensor], Tensor]
    back: Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Tap:
    """Nonlinear function inside the model.

    Attributes:
        edge: Graph edge of its input a.
        shape: Shape of the input.
        curvature: Second derivative of <g, phi(a)>, with the gradient g of the loss at phi(a). It
            has the shape of the input for an elementwise function, and the shape ``(..., d, d)``,
            one matrix per row, for a function of rows.
        rows: Conversion of the input to rows; None for an elementwise function.
    """

    edge: GradientEdge
    shape: torch.Size
    curvature: Tensor
    rows: _Rows | None

    def product(self, residual: Residual) -> Callable[[Tensor], Tensor]:
        if self.rows is None:
            kept = positive(self.curvature, residual)
            return lambda tangent: kept * tangent
        # The curvature V diag(l) V' of a row becomes V diag(positive(l)) V'.
        values, vectors = torch.linalg.eigh(self.curvature)
        matrix = (vectors * positive(values, residual)[..., None, :]) @ vectors.mT
        rows = self.rows
        return lambda tangent: rows.back((matrix @ rows.of(tangent)[..., None])[..., 0])


@dataclass(frozen=True)
class PairTap:
    """Product ``a b`` inside the model, elementwise or of matrices.

    With the gradient g of the loss at the product, the second derivative of <g, a b> is
    ``R = [[0, K], [K', 0]]`` with ``K db = g db`` elementwise, or ``K db = g db'`` for matrices.

    Attributes:
        edges: Graph edges of the factors.
        shapes: Shapes of the factors.
        slope: Gradient g.
        of_matrices: Whether the product is a matrix product.
    """

    edges: tuple[GradientEdge, GradientEdge]
    shapes: tuple[torch.Size, torch.Size]
    slope: Tensor
    of_matrices: bool

    def product(self, residual: Residual) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]:
        crossed = self._crossed_of_matrices if self.of_matrices else self._crossed
        if residual == "none":
            return crossed
        if residual == "zero":
            return lambda a, b: (torch.zeros_like(a), torch.zeros_like(b))
        absolute = self._absolute_of_matrices() if self.of_matrices else self._absolute
        match residual:
            case "abs":
                return absolute
            case "clip":
                # The positive part of R is (R + |R|) / 2.
                def clipped(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
                    pairs = zip(crossed(a, b), absolute(a, b), strict=True)
                    first, second = ((x + y) / 2 for x, y in pairs)
                    return first, second

                return clipped

    def _crossed(self, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        first, second = self.shapes
        return (self.slope * b).sum_to_size(first), (self.slope * a).sum_to_size(second)

    def _absolute(self, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        # |R| = diag(|g|, |g|); the sums undo the broadcasting of the factors.
        first, second = self.shapes
        size = self.slope.abs()
        return (size * a).sum_to_size(first), (size * b).sum_to_size(second)

    def _crossed_of_matrices(self, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        return self.slope @ b.mT, a.mT @ self.slope

    def _absolute_of_matrices(self) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]:
        # |R| = diag((g g')^1/2, (g' g)^1/2). With g = U S V', the blocks are U S U' and V S V'.
        left, size, right = torch.linalg.svd(self.slope, full_matrices=False)
        rows, columns = (
            (left * size[..., None, :]) @ left.mT,
            (right.mT * size[..., None, :]) @ right,
        )
        return lambda a, b: (rows @ a, b @ columns)


def positive(values: Tensor, residual: Residual, /) -> Tensor:
    """Replace negative curvatures according to ``residual``."""
    match residual:
        case "abs":
            return values.abs()
        case "clip":
            return values.clamp_min(0)
        case "zero":
            return torch.zeros_like(values)
        case "none":
            return values


def pair_tap_of(node: Node, slope: Tensor) -> PairTap | None:
    following = [node.next_functions[i] for i in PRODUCTS[node.name()]]
    edges = [GradientEdge(f, place) for f, place in following if f is not None]
    if len(edges) < 2:
        return None
    shapes = [_shape_at(edge) for edge in edges]
    scale = getattr(node, "_saved_alpha", 1)
    return PairTap(
        (edges[0], edges[1]),
        (shapes[0], shapes[1]),
        scale * slope.detach(),
        node.name() != "MulBackward0",
    )


def _shape_at(edge: Any) -> torch.Size:
    return torch.Size(edge.node._input_metadata[edge.output_nr].shape)


def tap_of(node: Node, slope: Tensor) -> Tap | None:
    edge = cast(GradientEdge, input_of(node))
    # The node is the map w -> phi'(a) w. At w = g, its derivative with respect to a is phi''(a) g.
    others = [None] * (_outputs(node) - 1)
    pulled = cast(Callable[..., Any], node)(slope.detach(), *others)
    pulled = pulled[0] if isinstance(pulled, tuple) else pulled
    if pulled is None or not pulled.requires_grad:
        return None
    if node.name() not in ROWWISE:
        curvature = _derivative(pulled, edge, torch.ones_like(pulled))
        return None if curvature is None else Tap(edge, pulled.shape, curvature, None)
    rows = _rows_of(node, pulled)
    width = rows.of(pulled).shape[-1]
    if width > _LONGEST_ROW:
        raise NotImplementedError(
            f"{node.name().removesuffix('Backward0')} acts on rows of {width} entries, and the "
            f"eigenvalues of matrices larger than {_LONGEST_ROW} take too long: use residual='zero'"
        )
    columns = []
    for i in range(width):
        unit = torch.zeros_like(rows.of(pulled))
        unit[..., i] = 1
        column = _derivative(pulled, edge, rows.back(unit))
        if column is None:
            return None
        columns.append(rows.of(column))
    return Tap(edge, pulled.shape, torch.stack(columns, dim=-2), rows)


def _outputs(node: Any) -> int:
    # Normalisations also return their statistics, so their nodes take further cotangents.
    return 1 if node.name() == "NativeLayerNormBackward0" else len(node._input_metadata)


def _derivative(pulled: Tensor, edge: GradientEdge, direction: Tensor) -> Tensor | None:
    return torch.autograd.grad(
        pulled, [edge], direction.detach(), retain_graph=True, allow_unused=True
    )[0]


def _rows_of(node: Any, like: Tensor) -> _Rows:
    shape = like.shape
    if node.name() in _SOFTMAX:
        # The axis is saved as an unsigned integer, so a negative axis exceeds 2^63.
        axis = node._saved_dim - 2**64 if node._saved_dim >= 2**63 else node._saved_dim
        return _Rows(lambda t: torch.movedim(t, axis, -1), lambda r: torch.movedim(r, -1, axis))
    if node.name() == "NativeLayerNormBackward0":
        first = len(shape) - len(node._saved_normalized_shape)
        return _Rows(lambda t: t.flatten(first), lambda r: r.reshape(shape))
    if node.name() == "NativeGroupNormBackward0":
        groups = node._saved_group
        return _Rows(lambda t: t.reshape(shape[0], groups, -1), lambda r: r.reshape(shape))
    # With batch statistics, a row is one channel of all examples.
    channels = (shape[1], shape[0], *shape[2:])
    return _Rows(
        lambda t: t.transpose(0, 1).flatten(1),
        lambda r: r.reshape(channels).transpose(0, 1),
    )


def input_of(node: Node) -> GradientEdge | None:
    following, place = node.next_functions[0]
    return None if following is None else GradientEdge(following, place)
